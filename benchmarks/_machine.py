"""Shared by the benchmarks: the JSON line that ends each, their models, the actors of a run."""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MODEL = "smollm2-135m-instruct"
SMALL = HERE / "paper_table_base"
"""A model of 4 million parameters, with which `--quick` runs in seconds."""


def tell(benchmark: str, figures: dict[str, Any], whole: bool, **more: Any) -> None:
    """Print the JSON line that ends a benchmark. A `whole` run also leaves it in `results/NAME.json`."""
    line = {"benchmark": benchmark, "figures": figures, **more, "machine": machine(), "commit": commit()}
    if whole:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{benchmark}.json").write_text(json.dumps(line, indent=2) + "\n")
    print(json.dumps(line), flush=True)


def model(quick: bool) -> Path:
    """The folder of SmolLM2-135M-Instruct, or of `SMALL` if the run is quick."""
    from srl_rlvr.cli.session import model_cache
    from srl_rlvr.policies import base_models

    return SMALL if quick else base_models.resolve(MODEL, model_cache())


def of_tests(name: str) -> Any:
    """A module of `tests/`, which makes tiny models."""
    sys.path.append(str(HERE.parent / "tests"))
    return importlib.import_module(name)


def random_prompts(folder: Path, count: int, length: int) -> list[list[int]]:
    """Tokens of the vocabulary of the model in `folder`, the same each time."""
    import numpy as np

    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(10, min(40_000, vocabulary), (count, length)).tolist()


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
    }


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def actors_environment(quick: bool = False) -> dict[str, Any]:
    """The runtime environment of an actor that computes: on all cores, on one if the run is quick."""
    from actors.cluster import worker_environment

    return worker_environment(0, 1 if quick else os.cpu_count() or 1)


def in_the_actors_environment(quick: bool = False) -> None:
    """Start this command anew as our actors run: on all cores, with the allocator that Ray
    brings, at the niceness of its workers. A quick run has one core and keeps its niceness."""
    environment = actors_environment(quick)["env_vars"]
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.environ.update(environment)
        os.nice(0 if quick else 15)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def crew(name: str, base: Path, engine: str, lora_rank: int, folder: Path) -> Any:
    """The real actors of a run with the model in `base`, ready: a learner, a generator, a verifier."""
    import ray

    from actors import supervisor
    from srl_rlvr import config as configs

    tree = {
        "name": name,
        "model": {"base": str(base), "lora_rank": lora_rank},
        "data": [{"family": "chain_sum"}],
        "stages": [{"kind": "rlvr"}],
        "engine": {"kind": engine},
        "cluster": {"cpus_per_generator": 0.5, "cpus_per_learner": 0.5},
    }
    config = configs.parse(tree, "benchmark")
    if not ray.is_initialized():
        supervisor.start_ray(config, print)
    crew = supervisor.Crew(config, str(base.resolve()), name, folder / name)
    crew.wait_until_ready()
    return crew


def prompt_row(index: int, token_ids: list[int]) -> dict[str, Any]:
    """A row of a Prompt table, each a trunk of its own."""
    return {
        "id": f"p{index}",
        "example_id": f"p{index}",
        "stage": "rlvr",
        "step_index": -1,
        "token_ids": token_ids,
        "trunk_id": f"p{index}",
        "offset": len(token_ids),
        "verifier": "exact",
        "reference": "",
        "metadata": "{}",
    }


def import_trl() -> Any:
    """TRL, which the benchmarks compare with."""
    try:
        import trl
    except ImportError:
        raise SystemExit("this benchmark compares with TRL: pip install 'srl-rlvr[bench]'") from None
    return trl
