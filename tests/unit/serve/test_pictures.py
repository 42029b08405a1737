"""Which images a request may bring, and from where."""

from __future__ import annotations

import asyncio
import base64
import functools
import http.server
import io
import ipaddress
import threading
from collections.abc import Iterator

import pytest
from PIL import Image

from serve import pictures
from serve.config import Images
from serve.errors import Refusal
from serve.sandbox import Sandbox

ALLOWED = Images(fetch=True, mib=0.01, timeout_s=2)


@functools.cache
def png(side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((side, side), 90).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module", autouse=True)
def sandbox() -> Iterator[Sandbox]:
    global SANDBOX
    SANDBOX = Sandbox(1)
    yield SANDBOX
    SANDBOX.close()


def taken(value: str, allowed: Images = ALLOWED) -> bytes:
    [found] = asyncio.run(pictures.read_all([value], allowed, SANDBOX))
    return found


def refused(value: str, allowed: Images = ALLOWED) -> Refusal:
    with pytest.raises(Refusal) as found:
        taken(value, allowed)
    return found.value


def test_base64_and_data_addresses_are_read() -> None:
    address = pictures.data_address(png())
    assert taken(address) == png()
    assert taken(address.partition(",")[2]) == png()


def test_base64_may_be_wrapped() -> None:
    wrapped = base64.encodebytes(png()).decode()
    assert wrapped.count("\n") > 1
    for text in (wrapped, wrapped.replace("\n", "\r\n"), f"data:image/png;base64,{wrapped}"):
        assert taken(text) == png()
    assert "not valid base64" in refused(wrapped[:40] + "*" + wrapped[40:]).message


def test_an_image_that_takes_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    Image.new("L", (7000, 7000)).save(out, "PNG")
    for name in ("_READ_S", "_PROCESSOR_S"):
        monkeypatch.setattr(f"serve.pictures.{name}", 0.001)
        found = refused(pictures.data_address(out.getvalue()), Images(mib=1))
        assert found.status == 400 and "takes too long" in found.message
        monkeypatch.undo()
    assert taken(pictures.data_address(png())) == png()


def test_a_large_image_is_refused_before_it_is_opened() -> None:
    assert refused(pictures.data_address(png(200))).status == 413


PRIVATE = [  # by their numbers: 10.…, 192.168.…, and where clouds keep a machine's credentials
    *(str(ipaddress.IPv4Address(number)) for number in (0x0A000001, 0xC0A80101, 0xA9FEA9FE, 0)),
    "127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "127.0.0.1.", "2130706433",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_never_asked(host: str) -> None:
    found = refused(f"http://{host}/a.png")
    assert found.status == 400 and ("not a public one" in found.message or "cannot be read" in found.message)


NOT_PUBLIC = [
    "127.0.0.1", "169.254.169.254", "100.64.0.1", "192.0.0.8", "192.88.99.1", "224.0.0.1", "240.0.0.1",
    "255.255.255.255",
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1",
    "2002:7f00:1::", "2002:808:808::1", "2001:0:808:808::1", "2001:db8::1", "fe80::1", "fec0::1", "fc00::1", "ff02::1",
    "ff0e::1", "2a00::5efe:7f00:1", "2a00::200:5efe:a00:1", "100::1", "5f00::1",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_is_or_holds_a_private_one_is_not_public(address: str) -> None:
    assert not pictures.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2a00:1450:4001::1", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are(address: str) -> None:
    assert pictures.is_public(address)


@pytest.mark.parametrize("host", ["①②⑦.0.0.1", "１２７.0.0.1", "127。0。0。1"])
def test_a_private_address_in_other_digits_is_one(host: str) -> None:
    assert "127.0.0.1 is not a public one" in refused(f"http://{host}/a.png").message


def test_a_name_that_resolves_to_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolved(self: object, host: str, port: int, **_: object) -> object:
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", resolved)
    assert "not a public one" in refused("http://images.example.com/a.png").message


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real server; that it stands on a private address is overlooked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            large = self.path == "/large"
            self.send_response(302 if self.path == "/moved" else 200)
            self.send_header("location", "http://127.0.0.1/secret")
            self.end_headers()
            self.wfile.write(png(200) if large else png())

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr("ipaddress.IPv4Address.is_global", True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_an_address_is_fetched_where_that_is_allowed(site: str) -> None:
    assert taken(f"{site}/a.png") == png()
    assert "not fetched here" in refused(f"{site}/a.png", Images(fetch=False)).message


def test_redirects_and_large_files_are_not_followed_to_their_end(site: str) -> None:
    assert "302" in refused(f"{site}/moved").message
    assert refused(f"{site}/large").status == 413
