"""A Ray cluster: joining one or starting one here, and what a process on it is given."""

from __future__ import annotations

import logging
import os
import re
import socket
from pathlib import Path
from typing import Any

import grpc
import ray

from srl_rlvr.errors import InputError

NAMESPACE = "srl-rlvr"
_CONNECT_DEADLINE_S = 5.0


def connect(asked: str, cpus: int, dashboard: bool) -> bool:
    """Join the cluster at this address, or that of RAY_ADDRESS, or start a local one with so many CPUs.

    Returns whether it is local. Raises InputError where it cannot be reached.
    """
    address = asked or os.environ.get("RAY_ADDRESS", "")
    if address:
        check_reachable(address)
    try:
        if not address:
            ray.init(
                address="local",  # a stale address of another cluster must not capture a local run
                num_cpus=cpus,
                include_dashboard=dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace=NAMESPACE,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"the Ray cluster at '{address}'" if address else "a local Ray"
        hint = (
            "is it running, and is RAY_AUTH_MODE/RAY_AUTH_TOKEN_PATH set as on its head?" if address else "see its log"
        )
        raise InputError(f"cannot reach {where}: {str(error).strip().splitlines()[0]}; {hint}") from None
    return not address


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
