"""Images in requests: base64, a `data:` address, or an http(s) one where fetching is allowed. Private addresses are
never asked: every address that a name resolves to is checked, and the connection goes to one that was."""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import socket
from collections.abc import Sequence

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from serve.config import Images
from serve.errors import Refusal
from serve.sandbox import Sandbox, SandboxError
from srl_rlvr import images

# What is given out of IPv6, less what is special there: tunnels (Teredo, 6to4), documentation, and their like.
_GIVEN_OUT = ipaddress.IPv6Network("2000::/3")
_SPECIAL = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_TRANSLATED = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "64:ff9b::/96")))  # their last 32 bits are IPv4's
_ISATAP = 0x00005EFE  # before an IPv4 address that ends an IPv6 address of any network
_PROTOCOLS = tuple(map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24")))  # and relays to 6to4
_WHITE = b" \t\r\n"  # as `base64 FILE` and MIME wrap lines
_HEADER_S, _PROCESSOR_S = 0.5, 5.0  # of a processor: a photograph takes milliseconds, 50 million pixels a second
_READ_S = 20.0  # of any clock, on a machine that has other things to do


async def read_all(values: Sequence[str], allowed: Images, sandbox: Sandbox) -> list[bytes]:
    """The encoded images of one request, in order. Raises Refusal as `read` and `size` do, and for too many."""
    if len(values) > allowed.most:
        said = f"there are {len(values)} images in one request; {allowed.most} are the most"
        raise Refusal(400, said, param="image")
    found, left = [], images.MAX_PIXELS
    for value in values:
        found.append(await read(value, allowed))
        width, height = await size(found[-1], sandbox)
        left -= width * height
        if left < 0:
            raise Refusal(400, f"the images of one request have more than {images.MAX_PIXELS:,} pixels", param="image")
    return found


async def read(value: str, allowed: Images) -> bytes:
    """The bytes that the value holds or points to. Raises Refusal."""
    if value.startswith(("http://", "https://")):
        encoded = await _fetch(value, allowed)
    else:
        if value.startswith("data:"):
            head, comma, value = value.partition(",")
            if not comma or not head.endswith(";base64"):
                raise Refusal(400, "an image's data: address should be data:image/…;base64,…", param="image")
        try:
            encoded = base64.b64decode(value.encode("ascii").translate(None, _WHITE), validate=True)
        except (binascii.Error, ValueError):
            raise Refusal(400, "the image is not valid base64", param="image") from None
    if len(encoded) > allowed.mib * 2**20:
        raise Refusal(413, f"the image has more than {allowed.mib:g} MiB", param="image")
    return encoded


async def size(encoded: bytes, sandbox: Sandbox) -> tuple[int, int]:
    """(width, height) of an image that can be read to its end. Raises Refusal."""
    try:
        width, height = await sandbox.run(
            "srl_rlvr.images:checked_size", encoded, _HEADER_S, deadline_s=_READ_S, processor_s=_PROCESSOR_S
        )
    except ValueError as error:
        raise Refusal(400, f"the image {error}", param="image") from None
    except TimeoutError:
        raise Refusal(400, "the image takes too long to read: save it anew as PNG or JPEG", param="image") from None
    except SandboxError:
        raise Refusal(400, "the image cannot be read: save it anew as PNG or JPEG", param="image") from None
    return width, height


def data_address(encoded: bytes) -> str:
    return f"data:image/*;base64,{base64.b64encode(encoded).decode()}"


async def _fetch(address: str, allowed: Images) -> bytes:
    if not allowed.fetch:
        raise Refusal(400, "image addresses are not fetched here: send the image itself as base64", param="image")
    try:
        url = URL(address)  # aiohttp's own: it reads digits of every script, and asks no resolver for an address
        host = url.host or ""
        if _is_address(host) and not is_public(host):
            raise Refusal(400, f"image address {host} is not a public one", param="image")
        patience = aiohttp.ClientTimeout(total=allowed.timeout_s)
        connector = aiohttp.TCPConnector(resolver=_PublicOnly())
        async with (
            aiohttp.ClientSession(connector=connector, timeout=patience) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise Refusal(400, f"the image's address answered {response.status}; redirects are not followed",
                              param="image")  # fmt: skip
            encoded = b""
            async for piece in response.content.iter_chunked(2**16):
                encoded += piece
                if len(encoded) > allowed.mib * 2**20:
                    raise Refusal(413, f"the image has more than {allowed.mib:g} MiB", param="image")
            return encoded
    except TimeoutError:
        raise Refusal(
            400, f"the image's address did not answer within {allowed.timeout_s:g} s", param="image"
        ) from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise Refusal(400, f"the image's address cannot be read ({type(error).__name__})", param="image") from None


def is_public(address: str) -> bool:
    """Whether the numeric address is everyone's, and so is the IPv4 address that it holds, if it holds one."""
    found = ipaddress.ip_address(address)
    if found.is_multicast or found.is_reserved and found.version == 4:
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return found.is_global and not any(found in network for network in _PROTOCOLS)
    held = str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF))
    if any(found in network for network in _TRANSLATED):
        return is_public(held)
    if (int(found) >> 32) & 0xFDFFFFFF == _ISATAP and not is_public(held):
        return False
    return found in _GIVEN_OUT and not any(found in network for network in _SPECIAL)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _PublicOnly(AbstractResolver):
    """Resolves names to public addresses only: aiohttp connects to what it is given here, and asks no more."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        public: list[ResolveResult] = [
            {"hostname": host, "host": str(place[0]), "port": port, "family": kind, "proto": proto, "flags": 0}
            for kind, _, proto, _, place in found
            if is_public(str(place[0]))
        ]
        if not public:
            raise Refusal(400, f"image address {host} is not a public one", param="image")
        return public

    async def close(self) -> None:
        pass
