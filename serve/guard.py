"""What holds for every request, before and after its endpoint: an id, a key, a size, a form, and a line in the
journal."""

from __future__ import annotations

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
        state = scope["state"] = dict(scope.get("state", {})) | {"id": id, "key": "", "model": "", "version": ""}
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
                if scope["method"] == "POST":
                    receive = await self._read(receive, headers)
            except Refusal as refusal:
                await refused(refusal)(scope, receive, sent)
                return
            await self.app(scope, receive, sent)
        except Exception as error:  # a defect: it is logged whole, and the client is told that it is one
            log.exception("request %s failed", id)
            if status != 499:
                raise
            said = f"the server failed ({type(error).__name__}); the request was {id}"
            await refused(Refusal(500, said))(scope, receive, sent)
        finally:
            taken = time.monotonic() - began
            self.journal.note(Entry(id, scope["path"], state["model"], state["version"], status, taken, time.time()))

    async def _read(self, receive: Any, headers: dict[str, str]) -> Any:
        """The whole body, to be received again. Raises Refusal where it is no JSON by its type, or too large."""
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
        waiting = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Any:
            return waiting.pop() if waiting else await receive()

        return again


def _scope_of(path: str) -> str:
    """What a key has to be allowed; nothing where any key will do."""
    if path.startswith("/console/"):
        return "console"
    _, _, rest = path.strip("/").partition("/")
    return "" if rest.startswith("models") else rest.partition("/")[0]
