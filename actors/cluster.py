"""A Ray cluster: joining one or starting one here, and what a process on it is given."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import ray

from srl_rlvr.errors import InputError

NAMESPACE = "srl-rlvr"
_CONNECT_DEADLINE_S = 5.0
_LONGEST_NAME = 120  # it is a part of the names of log files


def connect(asked: str, cpus: int, dashboard: bool) -> bool:
    """Join the cluster at this address, or that of RAY_ADDRESS, or start a local one with so many CPUs.

    Returns whether it is local. Raises InputError if it cannot be reached or started.
    """
    address = asked or os.environ.get("RAY_ADDRESS", "")
    if address:
        check_reachable(address)
        how: dict[str, Any] = {"address": address}
    else:
        secure_token()
        how = {"address": "local", "num_cpus": cpus, "include_dashboard": dashboard}  # never a stale cluster's address
    try:
        ray.init(**how, log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE)
    except Exception as error:  # Ray raises nearly anything, bare Exception as well
        if address:
            raise InputError(
                f"cannot reach the Ray cluster at '{address}': {_first_line(error)}; is it running, and is "
                "RAY_AUTH_MODE/RAY_AUTH_TOKEN_PATH set as on its head?"
            ) from error
        raise InputError(f"Ray cannot start on this machine: {_start_failure(error)}") from error
    return not address


def session_folder() -> Path:
    """The folder of logs and sockets of the Ray that runs on this machine."""
    return Path(_temporary_folder()[1]) / "ray" / ray.get_runtime_context().get_session_name()


def _start_failure(error: Exception) -> str:
    """Return the cause and what to do about it."""
    variable, place = _temporary_folder()
    said = _first_line(error)
    if "AF_UNIX" in said:
        return f"the folder for its sockets, {place}, has too long a path; set {variable} to a shorter one, as /tmp"
    if "timed out during startup" in said:
        return "it did not start within 30 s; end other programs, or try again while the machine has less to do"
    if isinstance(error, OSError):
        return f"it cannot write below {place}: {said}; set {variable} to a folder that you can write to"
    return f"{said}; its logs are below {place}/ray/session_latest/logs"


def _temporary_folder() -> tuple[str, str]:
    """(the variable that names it, the folder) that Ray has its own below."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "RAY_TMPDIR")
    return variable, os.environ.get(variable, "/tmp")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_authentication() -> None:
    """Raises InputError if Ray's token authentication is switched off: whoever reached a port could run code."""
    if not _uses_token():
        raise InputError(
            f"RAY_AUTH_MODE is '{os.environ['RAY_AUTH_MODE']}': without its token whoever reaches Ray's ports can run "
            "code; leave RAY_AUTH_MODE out, or set it to 'token'"
        )


def _uses_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def secure_token() -> None:
    """Make Ray's token if there is none yet, in a file that only its owner can read: Ray's own would be readable by
    all. Raises InputError if the file cannot be made so."""
    if not _uses_token() or os.environ.get("RAY_AUTH_TOKEN"):
        return
    given = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    try:
        if not given and not path.exists():
            _write_token(path)
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise InputError(
            f"Ray's token {path}: {error.strerror or error}; it should be a file that only its owner can read: see "
            "RAY_AUTH_TOKEN_PATH"
        ) from None


def _write_token(path: Path) -> None:
    """Whole or not at all; another command may write it at the same time, and then that one's stands."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):
        os.link(partial, path)
    partial.unlink()


def ascii_name(text: str, keep: str = "") -> str:
    """Return the text as Ray takes it for a name or a tag of its metrics: ASCII, all but letters, digits, `_.-~` and
    `keep` percent-encoded. Long ones are cut, and stay distinct."""
    found = quote(text, safe=keep, errors="surrogatepass")
    if len(found) <= _LONGEST_NAME:
        return found
    digest = hashlib.sha256(found.encode()).hexdigest()[:8]
    return f"{found[: _LONGEST_NAME - 9]}-{digest}"


def worker_environment(gpus: float, threads: int) -> dict[str, Any]:
    """The runtime environment of a process that computes: its threads and, on CPUs, the jemalloc that Ray brings.

    Ray starts a worker with as many OpenMP threads as CPUs are reserved for it, and what a thread of the process sets
    later holds for that thread alone. torch asks for aligned blocks, whose room glibc before 2.38 does not find again
    when they are freed: that alone is 0.7 GiB of a learner's peak at 135M parameters.
    """
    variables = {"OMP_NUM_THREADS": str(threads)}
    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if not gpus and "LD_PRELOAD" not in os.environ and library.is_file():
        variables["LD_PRELOAD"] = str(library)
    return {"env_vars": variables}


def check_reachable(address: str) -> None:
    """Raises InputError where no Ray cluster answers at `address`: Ray itself would try for minutes, without a word."""
    if address in ("auto", "local"):
        return
    parts = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    if parts is None:
        raise InputError(f"'{address}' is no address of a Ray cluster: write HOST:6379, ray://HOST:10001 or auto")
    try:
        socket.create_connection((parts[1], int(parts[2])), _CONNECT_DEADLINE_S).close()
        if os.environ.get("RAY_USE_TLS", "0") == "0":  # with certificates, Ray itself has to shake hands
            with grpc.insecure_channel(f"{parts[1]}:{parts[2]}") as channel:
                grpc.channel_ready_future(channel).result(_CONNECT_DEADLINE_S)
    except (OSError, OverflowError, grpc.FutureTimeoutError) as error:
        silent = "what listens there does not answer as Ray does"
        cause = silent if isinstance(error, grpc.FutureTimeoutError) else getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot reach the Ray cluster at '{address}': {cause}; start it (`ray start --head`), or correct "
            "cluster.address or RAY_ADDRESS"
        ) from None
