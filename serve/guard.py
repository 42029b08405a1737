"""Guard of every request, before and after its endpoint: a host, an id, a key, a size, a form, and a line in the
journal."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.middleware.cors import CORSMiddleware

from serve import bodies
from serve.access import ANY_FEEDBACK, SCOPES, Doorkeeper
from serve.config import GatewaySettings, is_loopback
from serve.errors import Refusal, refused
from serve.journal import Entry, Journal
from serve.sandbox import Sandbox

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

_OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json", "/console")
_ID = re.compile(r"[\w.:-]{1,200}", re.ASCII)
_HOST = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(?::\d*)?")
_OWN_ID = b"x-request-id"
_OWN_ID_BEHIND_PROXY = b"x-gateway-request-id"  # Ray Serve's proxy answers with an x-request-id that clients choose
_CLIENTS_ID = b"x-client-request-id"
_NO_KEYS_SCOPE = "this path"  # of paths that are not known
_SAFE = (  # no page of another's may show an answer in a frame, or take it for something else than it says
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
)
_SMALL = 2**20  # bytes of a body that is read whatever is held
_LARGE_AT_ONCE = 16  # bodies of the largest size that are held at the same time


def install(app: FastAPI, settings: GatewaySettings, journal: Journal, says_id: bool, sandbox: Sandbox) -> None:
    app.add_middleware(Guard, settings=settings, journal=journal, says_id=says_id, sandbox=sandbox)
    if settings.access.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.access.cors, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id", "x-gateway-request-id", "x-client-request-id"],
        )  # fmt: skip


class Guard:
    """ASGI, so that streams pass through as they are."""

    def __init__(self, app: Any, settings: GatewaySettings, journal: Journal, says_id: bool, sandbox: Sandbox):
        self.app, self.journal, self.sandbox = app, journal, sandbox
        self.own_id = _OWN_ID if says_id else _OWN_ID_BEHIND_PROXY
        self.limits = settings.limits
        self.most = int(settings.limits.body_mib * 2**20)
        self.hosts = {name.lower() for name in settings.hosts}
        self.door = Doorkeeper(settings.access.keys, settings.limits.requests_per_minute)
        self.held = 0  # bytes of the bodies of requests under way

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given, id = headers.get("x-request-id", ""), f"req-{uuid.uuid4().hex}"
        state = scope["state"] = dict(scope.get("state", {})) | {
            "id": id, "key": "", "any_feedback": False, "model": "", "version": "",
            "charge": _nothing,  # what the request counts beyond one
            "held": 0,  # bytes of its body
            "refused": 0,  # the status of a stream that failed after its head
        }  # fmt: skip
        more = [(self.own_id, id.encode()), *_SAFE] + ([(_CLIENTS_ID, given.encode())] if _ID.fullmatch(given) else [])
        began, status, body = time.monotonic(), 499, b""  # 499: a client that left before the answer

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            try:
                await bodies.check(body, self.limits.values, self.sandbox)
            except Refusal as refusal:
                await refused(refusal)(scope, receive, send)
            else:
                await self.app(scope, receive, send)

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message.get("headers", ())}
                message["headers"] = [*message.get("headers", ()), *(pair for pair in more if pair[0] not in present)]
            await send(message)

        try:
            try:
                self._check_host(scope)
                wanted = _scope_of(scope["path"])
                if scope["path"] not in _OPEN:
                    state["key"] = self.door.admit(headers.get("authorization", ""), wanted)
                    state["any_feedback"] = self.door.allows(state["key"], ANY_FEEDBACK)
                    state["charge"] = functools.partial(self.door.charge, state["key"])
                if scope["method"] == "POST" and wanted in SCOPES and wanted != "console":
                    body = await self._read(receive, headers, state)
            except Refusal as refusal:
                await refused(refusal)(scope, receive, sent)
                return
            except _LeftError:
                return
            await _while_there(answer, scope, body, receive, sent)
        except Exception as error:  # a defect: it is logged whole, and the client is told that it is one
            log.exception("request %s failed", id)
            if status != 499:
                status = 500
                raise
            said = f"the server failed ({type(error).__name__}); the request was {id}"
            await refused(Refusal(500, said))(scope, receive, sent)
        finally:
            self.held -= state["held"]
            taken, status = time.monotonic() - began, state["refused"] or status
            self.journal.note(
                Entry(id, scope["path"], state["model"], state["version"], status, taken, time.time(), state["key"])
            )

    def _check_host(self, scope: Any) -> None:
        """On a machine's own address, a page from elsewhere may have had its name resolved to here."""
        if not self.hosts:
            return
        for name, value in scope["headers"]:
            if name == b"host" and not self._knows(value.decode("latin-1")):
                said = "this gateway is asked as localhost; more names: access.hosts in SERVE.toml"
                raise Refusal(400, f"the Host header names another machine; {said}")

    def _knows(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        name = found[1].lower().removesuffix(".") if found else ""
        return name in self.hosts or is_loopback(name.removeprefix("[").removesuffix("]"))

    async def _read(self, receive: Any, headers: dict[str, str], state: dict[str, Any]) -> bytes:
        """The whole body. Raises Refusal if it is no JSON by its type, is too large, or does not come in time."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"the body's content type is '{kind[:100]}'; it should be application/json")
        most = f"the body has more than {self.most / 2**20:g} MiB"
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self.most):
            raise Refusal(413, most)
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.limits.receive_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _LeftError
                    piece = message.get("body", b"")
                    body += piece
                    self.held += len(piece)
                    state["held"] += len(piece)
                    more = message.get("more_body", False)
                    if len(body) > self.most:
                        raise Refusal(413, most)
                    if len(body) > _SMALL and self.held > _LARGE_AT_ONCE * self.most:
                        raise Refusal(503, "too many large requests at once; come back later", retry_after=2)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {self.limits.receive_s:g} s") from None
        return bytes(body)


class _LeftError(Exception):
    """The client left before its request was whole."""


def _nothing(more: int) -> None:
    pass


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
    """What a key has to be allowed; nothing if any key will do."""
    if path in ("/v1/models", "/console/models") or path.startswith("/v1/models/"):
        return ""
    match path.split("/"):
        case ["", "console", *_]:
            return "console"
        case ["", "v1" | "v2", name, *_] if name:
            return name
        case ["", "rerank"]:
            return "rerank"
    return _NO_KEYS_SCOPE
