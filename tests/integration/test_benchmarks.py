"""Every benchmark that is quick enough runs with --quick and ends with its JSON line, with the figures of a full run.

Left out are those whose quick run is still whole trainings or several servers one after the other, a minute or more
each: `ablations`, `curriculum`, `end_to_end`, `overlap`, `paper_table`, `quickstart`, `seven_types` (whose data is not
in the project), `serving` and `serving_attack`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
PROJECT = Path(__file__).parents[2]
QUICK = (
    "rollout",
    "serving_faults",
    "simulate",
    "handover",
    "update",
    "exchange",
    "adapters",
    "bfloat16",
    "base_moves",
)
FIGURES = {
    "rollout": {"actor_vs_engine", "vs_generate", "of_gemm_bound", "of_float32_bound", "roof"},
    "serving_faults": {"replica_failed", "replica_gap_s", "engine_ready_s", "gcs_ended_s", "raylet_left"},
    "simulate": {"efficiency_256", "efficiency_1000", "controller_us_per_rollout"},
    "handover": {"full_s", "adapter_s"},
    "update": {"tree_vs_one_by_one", "tree_vs_trl", "peak_vs_trl", "gradient_vs_trl"},
    "exchange": {"share_of_step", "vs_pickle", "zero_copy"},
    "adapters": {"rank_16_vs_none", "rank_64_vs_none"},
    "bfloat16": {"sample_vs_float32", "learn_vs_float32", "float32_apart", "bfloat16_apart"},
    "base_moves": {"number_sorting: first line", "word_sorting: last line, in place"},
}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Those that are asked for, two at once: most of their time is starting."""
    asked = {item.callspec.params["name"] for item in request.session.items if "runs" in item.fixturenames}  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as two:
        yield {name: two.submit(quick, name) for name in QUICK if name in asked}


def quick(name: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, f"benchmarks/{name}.py", "--quick"]
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_run_has_the_figures_of_a_full_one(name: str, runs: dict[str, Future]) -> None:
    kept = PROJECT / "benchmarks" / "results" / f"{name}.json"
    before = kept.read_text() if kept.is_file() else ""
    finished = runs[name].result()
    assert finished.returncode == 0, finished.stderr[-4000:]
    line = json.loads(finished.stdout.splitlines()[-1])
    assert line["benchmark"] == name and line["commit"] and line["machine"]["cores"]
    assert line["figures"].keys() >= FIGURES[name]
    if before:
        assert line["figures"].keys() == json.loads(before)["figures"].keys()
        assert kept.read_text() == before  # only a full run writes it


def test_every_benchmark_has_a_quick_mode() -> None:
    found = [path for path in (PROJECT / "benchmarks").glob("*.py") if not path.name.startswith("_")]
    assert {path.stem for path in found} > set(QUICK)
    assert [path.name for path in found if '"--quick"' not in path.read_text()] == []
