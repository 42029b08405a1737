"""`srl-rlvr serve` listens: uvicorn around the gateway, in the command's own process."""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve.config import DRAIN_S, Limits, ServeConfig
from serve.errors import Refusal, refused
from srl_rlvr.errors import InputError

HEAD_BYTES = 64 * 2**10
HEAD_S = 20.0  # for a head, or for nothing at all on a new connection
SEND_S = 60.0  # in which a client has to read on
GRACE_S = 5.0  # for the gateway to say itself that a body did not come
KEEP_ALIVE_S = 75  # longer than clients keep unused connections: one that closes first fails a request on its way


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the port and does not listen yet. Raises InputError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise InputError(f"cannot listen at {host}:{port}: {error.strerror}; give another host or port") from None
    return found


class Connection(HttpToolsProtocol):
    """uvicorn's, with bounds on what a client that is not known yet can have: the size of a head, the time for head and
    body, the time in which it reads an answer, and how many connections there are.

    httptools has no bounds of its own, and h11, which has, answers fewer requests a second.
    """

    def __init__(self, *args: Any, limits: Limits, **named: Any):
        super().__init__(*args, **named)
        self.limits = limits
        self._unread = 0  # bytes since the parser last came to the end of a part
        self._in_body = False
        self._began = 0.0
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > 2 * self.limits.connections:
            transport.abort()
        elif len(self.connections) > self.limits.connections:
            self.app = _too_many_connections
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._received()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        if self._receiving is None:
            self._expect()
        super().data_received(data)
        if self._unread > HEAD_BYTES:
            self._refuse(431, b"the head of the request is too large")

    def on_headers_complete(self) -> None:
        self._unread, self._in_body = 0, True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread, self._in_body = 0, False
        self._received()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = self.loop.call_later(SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        super().resume_writing()

    def _expect(self) -> None:
        """A request, whole within so many seconds, its head within fewer."""
        self._began = self.loop.time()
        self._receiving = self.loop.call_later(min(HEAD_S, self.limits.receive_s), self._overdue)

    def _received(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _overdue(self) -> None:
        left = self._began + self.limits.receive_s + GRACE_S - self.loop.time()
        if self._in_body and left > 0:
            self._receiving = self.loop.call_later(left, self._overdue)
        elif self._unread:
            self._refuse(408, b"the request did not come in time")
        else:
            self.transport.close()

    def _refuse(self, status: int, said: bytes) -> None:
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle:  # else an answer is being sent
            head = b"content-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(said)
            self.transport.write(STATUS_LINE[status] + head + said)
        self.transport.close()


async def _too_many_connections(scope: Any, receive: Any, send: Any) -> None:
    answer = refused(Refusal(503, "too many connections; come back later", retry_after=1))
    answer.headers["connection"] = "close"
    await answer(scope, receive, send)


class Listener(uvicorn.Server):
    """Raises InputError where the certificate cannot be used."""

    def __init__(self, config: ServeConfig, gateway: Any):
        self.at = f"{'https' if config.access.tls_certificate else 'http'}://{config.host}:{config.port}"
        how = uvicorn.Config(
            gateway,
            ssl_certfile=config.access.tls_certificate or None,
            ssl_keyfile=config.access.tls_key or None,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_S,
            timeout_keep_alive=KEEP_ALIVE_S,
            http=functools.partial(Connection, limits=config.limits),  # type: ignore[arg-type]
            ws="none",
        )
        try:
            how.load()
        except (OSError, ssl.SSLError) as error:
            what = f"{config.access.tls_certificate} and {config.access.tls_key}"
            raise InputError(f"{what} are no certificate and its key: {error.strerror or error}") from None
        super().__init__(how)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"gateway  {self.at}/v1\nconsole  {self.at}/console\nOpenAPI  {self.at}/docs", flush=True)
