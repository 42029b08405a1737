"""What holds for every request, before and after its endpoint: an id, a key, a size, a form, and a line in the
journal."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.middleware.cors import CORSMiddleware

from serve.access import Doorkeeper
from serve.config import GatewaySettings
from serve.errors import Refusal, refused
from serve.journal import Entry, Journal

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

_OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json", "/console", "/docs/oauth2-redirect")
_ID = re.compile(r"[\w.:-]{1,200}")


def install(app: FastAPI, settings: GatewaySettings, journal: Journal, says_id: bool) -> None:
    app.add_middleware(Guard, settings=settings, journal=journal, says_id=says_id)
    if settings.access.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.access.cors, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id"],
        )  # fmt: skip


class Guard:
    """ASGI, so that streams pass through as they are."""

    def __init__(self, app: Any, settings: GatewaySettings, journal: Journal, says_id: bool):
        self.app, self.journal, self.says_id = app, journal, says_id
        self.most = int(settings.limits.body_mib * 2**20)
        self.door = Doorkeeper(settings.access.keys, settings.limits.requests_per_minute)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        id = given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        state = scope["state"] = dict(scope.get("state", {})) | {
            "id": id, "key": "", "model": "", "version": "",
            "refused": 0,  # the status of a stream that failed after its head
        }  # fmt: skip
        began, status = time.monotonic(), 499  # a client that left before the answer

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.says_id:
                    message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        try:
            try:
                if scope["path"] not in _OPEN:
                    state["key"] = self.door.admit(headers.get("authorization", ""), _scope_of(scope["path"]))
                body = await self._read(receive, headers) if scope["method"] == "POST" else b""
            except Refusal as refusal:
                await refused(refusal)(scope, receive, sent)
                return
            await _while_there(self.app, scope, body, receive, sent)
        except Exception as error:  # a defect: it is logged whole, and the client is told that it is one
            log.exception("request %s failed", id)
            if status != 499:
                status = 500
                raise
            said = f"the server failed ({type(error).__name__}); the request was {id}"
            await refused(Refusal(500, said))(scope, receive, sent)
        finally:
            taken, status = time.monotonic() - began, state["refused"] or status
            self.journal.note(Entry(id, scope["path"], state["model"], state["version"], status, taken, time.time()))

    async def _read(self, receive: Any, headers: dict[str, str]) -> bytes:
        """The whole body. Raises Refusal where it is no JSON by its type, or too large."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"the body's content type is '{kind}'; it should be application/json")
        most = f"the body has more than {self.most / 2**20:g} MiB"
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.most:
            raise Refusal(413, most)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.most:
                raise Refusal(413, most)
        return bytes(body)


async def _while_there(app: Any, scope: Any, body: bytes, receive: Any, send: Any) -> None:
    """Answer, unless the client leaves before: then what works for it is cancelled."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]
    gone = asyncio.Event()

    async def again() -> Any:
        if waiting:
            return waiting.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()
        work.cancel()

    work = asyncio.ensure_future(app(scope, again, send))
    watching = asyncio.ensure_future(watch())
    try:
        await work
    except asyncio.CancelledError:
        if not gone.is_set():
            raise
    finally:
        watching.cancel()


def _scope_of(path: str) -> str:
    """What a key has to be allowed; nothing where any key will do."""
    if path.startswith("/console/"):
        return "" if path == "/console/models" else "console"
    _, _, rest = path.strip("/").partition("/")
    return "" if rest.startswith("models") else rest.partition("/")[0]
