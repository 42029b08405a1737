"""The gateway listens: its port, its certificate, and clients that leave."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateway_fixtures import listening

from serve.config import Access, Limits, ServeConfig
from serve.gateway import create_app
from serve.listener import KEEP_ALIVE_S, Listener, bound
from srl_rlvr.errors import InputError

HERE = "127.0.0.1"


def self_signed(folder: Path) -> dict[str, str]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HERE)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .issuer_name(name)
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HERE))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return {"tls_certificate": str(folder / "certificate"), "tls_key": str(folder / "key")}


def test_a_port_that_is_taken_is_said_before_anything_starts() -> None:
    with socket.create_server((HERE, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen at {HERE}:{port}: Address already in use"):
            bound(HERE, port)


def test_a_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "certificate").write_text("nothing")
    for name in ("certificate", "absent"):
        with pytest.raises(InputError, match="are no certificate and its key"):
            Listener(ServeConfig(access=Access(tls_certificate=str(tmp_path / name), tls_key="key")), None)


def test_with_a_certificate_it_is_asked_by_https_only(settings: Any, tmp_path: Path) -> None:
    access = self_signed(tmp_path)
    with listening(create_app(settings, {}.__getitem__), **access) as address:
        trusting = ssl.create_default_context(cafile=access["tls_certificate"])
        response = httpx2.get(f"{address}/healthz", verify=trusting)
        assert response.json() == {"status": "ok"} and "server" not in response.headers
        with pytest.raises(httpx2.HTTPError):
            httpx2.get(f"{address}/healthz")  # of an unknown authority
        with pytest.raises(httpx2.HTTPError):
            httpx2.get(f"{address.replace('https', 'http')}/healthz")


def test_what_works_for_a_client_that_left_is_cancelled(settings: Any) -> None:
    class Slow:
        name, began, cancelled = "slow", threading.Event(), threading.Event()

        async def call(self, *arguments: Any) -> Any:
            self.began.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

    slow = Slow()
    everywhere: Any = {model.name: slow for model in settings.models}
    with listening(create_app(settings, everywhere.__getitem__)) as address:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{address}/v1/route", json={"input": "a"}, timeout=1)
        assert slow.began.is_set() and slow.cancelled.wait(5)
        assert httpx2.get(f"{address}/healthz").status_code == 200


# What a client that is not known yet can have


class Limited:
    """A listener with short times, and raw connections to it."""

    def __init__(self, settings: Any, monkeypatch: pytest.MonkeyPatch, **limits: Any):
        for name in ("HEAD_S", "SEND_S", "GRACE_S"):
            monkeypatch.setattr(f"serve.listener.{name}", 0.3)
        self.limits = Limits(receive_s=0.5, **limits)
        settings.limits = self.limits
        self.app = create_app(settings, {}.__getitem__)

    def __enter__(self) -> Limited:
        self._listening = listening(self.app, limits=self.limits)
        self.port = int(self._listening.__enter__().rpartition(":")[2])
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.__exit__(None, None, None)

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection((HERE, self.port), timeout=10)
        connection.sendall(sent)
        return connection

    def answered(self, connection: socket.socket) -> bytes:
        """Until it is closed."""
        found = b""
        with connection:
            while piece := connection.recv(65536):
                found += piece
        return found


POST = b"POST /v1/route HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
GET = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"


def test_silence_and_slow_heads_and_bodies_are_ended(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Limited(settings, monkeypatch) as limited:
        silent, slow_head = limited.connect(), limited.connect(b"GET /healthz HTTP/1.1\r\n")
        line_breaks = limited.connect(b"\r\n")
        slow_body = limited.connect(POST + b"content-length: 1000\r\n\r\n{")
        chunks = limited.connect(POST + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n")
        unread = limited.connect(b"POST /healthz HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{")
        trickled = {slow_head: b"a: b\r\n", line_breaks: b"\r\n", slow_body: b" ", chunks: b"1\r\n \r\n", unread: b" "}
        ended = time.monotonic() + 1.5
        while trickled and time.monotonic() < ended:
            for connection, more in list(trickled.items()):
                try:
                    connection.sendall(more)
                except OSError:
                    del trickled[connection]
            time.sleep(0.05)
        assert not trickled and limited.answered(silent) == b""
        assert httpx2.get(f"http://{HERE}:{limited.port}/healthz").status_code == 200


def test_a_body_that_does_not_come_is_answered_with_408(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Limited(settings, monkeypatch) as limited:
        for sent in (b"GET /healthz HTTP/1.1\r\n", POST + b"content-length: 10\r\n\r\n{"):
            assert limited.answered(limited.connect(sent)).startswith(b"HTTP/1.1 408 ")


def test_a_request_that_takes_long_to_answer_is_not_ended(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        name = "slow"

        async def call(self, *arguments: Any) -> Any:
            await asyncio.sleep(1)
            return [("a", 1.0, [])]

    everywhere: Any = {model.name: Slow() for model in settings.models}
    limited = Limited(settings, monkeypatch)
    limited.app = create_app(settings, everywhere.__getitem__)
    with limited:
        asked = httpx2.post(f"http://{HERE}:{limited.port}/v1/route", json={"input": "a"}, timeout=10)
        assert asked.status_code == 200


def test_a_connection_may_wait_for_its_next_request(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert KEEP_ALIVE_S > 60  # what Node, Go and aiohttp keep connections for is less, or they notice
    with Limited(settings, monkeypatch) as limited, limited.connect(GET) as connection:
        for _ in range(2):
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.4)
            connection.sendall(GET)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /healthz HTTP/1.1\r\na: " + b"x" * 500_000,
        b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 100_000,
        b"GET /" + b"x" * 500_000,
        POST + b"transfer-encoding: chunked\r\n\r\n0\r\na: " + b"x" * 500_000,
    ],
)
def test_a_large_head_is_refused(settings: Any, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    with Limited(settings, monkeypatch) as limited:
        connection = socket.create_connection((HERE, limited.port), timeout=10)
        try:
            connection.sendall(sent)
            answer = limited.answered(connection)
        except ConnectionError:
            answer = b"HTTP/1.1 431 "  # it was closed before all was sent
        assert answer[:13] in (b"HTTP/1.1 431 ", b"HTTP/1.1 408 ")
        assert limited.connect(GET).recv(100).startswith(b"HTTP/1.1 200 ")


def test_beyond_the_most_connections_a_request_is_503(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Limited(settings, monkeypatch, connections=3) as limited:
        monkeypatch.setattr("serve.listener.HEAD_S", 5)
        open_ = [limited.connect(GET) for _ in range(3)]
        assert all(connection.recv(65536).startswith(b"HTTP/1.1 200 ") for connection in open_)
        refused = limited.answered(limited.connect(GET))
        assert refused.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in refused
        for connection in open_:
            connection.sendall(GET)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            connection.close()
        time.sleep(0.1)
        assert limited.connect(GET).recv(65536).startswith(b"HTTP/1.1 200 ")


def test_an_answer_that_nobody_reads_is_ended(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    class Endless:
        name = "endless"

        async def stream(self, *arguments: Any) -> Any:
            try:
                while True:
                    yield "data: " + "x" * 100_000 + "\n\n"
                    await asyncio.sleep(0)
            finally:
                ended.set()

    everywhere: Any = {model.name: Endless() for model in settings.models}
    limited = Limited(settings, monkeypatch)
    limited.app = create_app(settings, everywhere.__getitem__)
    body = b'{"model": "task_llm", "stream": true, "messages": [{"role": "user", "content": "a"}]}'
    head = POST.replace(b"route", b"chat/completions") + b"content-length: %d\r\n\r\n" % len(body)
    with limited, limited.connect(head + body):
        assert ended.wait(10)
