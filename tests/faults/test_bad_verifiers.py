"""Verifiers that hang, crash or return NaN cost their own verdict, which is counted, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli_runs import RUN, rollouts, srl_rlvr, write_run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def test_failed_verdicts_are_counted_and_the_run_ends_well(tiny_model: Path, tmp_path: Path) -> None:
    head, _, rest = RUN.partition("[[stages]]")
    text = head + "[[stages]]" + rest.rpartition("[[stages]]")[2]  # RLVR alone
    names = [f"user_verifiers:{name}" for name in ("hangs", "crashes", "returns_nan")]
    text = text.replace('["user_verifiers:dense"]', json.dumps(names))
    run_file = write_run(tmp_path, tiny_model, text)
    problems = tmp_path / "problems.jsonl"
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    for index, row in enumerate(rows):
        row["verifier"] = names[index % 3]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    every_problem = "stages.rlvr.steps=8"  # of 18, 3 a step
    finished = srl_rlvr("train", run_file, "--set", every_problem, "--out", "out", cwd=tmp_path)
    assert finished.code == 0, finished.err
    metrics = pq.read_table(tmp_path / "out" / "metrics.parquet").to_pylist()
    assert sum(row["failed"] for row in metrics) > 0
    kept = rollouts(tmp_path / "out")
    failed = [row for row in kept if row["outcome"] == "failed"]
    details = " | ".join(row["detail"] for row in failed)
    assert "timed out after 2 s" in details
    assert "worker died (exit code 3)" in details
    assert "returned nan as reward" in details
    assert all(row["advantage"] == 0 for row in failed)
    scored = [row for row in kept if row["outcome"] == "scored"]
    assert any(row["advantage"] != 0 for row in scored)
