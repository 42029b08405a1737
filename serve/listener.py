"""`srl-rlvr serve` listens: uvicorn around the gateway, in the command's own process."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import uvicorn

from serve.config import DRAIN_S, ServeConfig
from srl_rlvr.errors import InputError


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
