"""The gateway listens: its port, its certificate, and clients that leave."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateway_fixtures import listening

from serve.config import Access, ServeConfig
from serve.gateway import create_app
from serve.listener import Listener, bound
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
