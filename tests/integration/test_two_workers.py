"""Two learner workers, DDP on gloo through Ray Train, learn what one learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_runs import metrics, srl_rlvr

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_two_workers_take_the_same_steps_as_one(trained: Any, tmp_path: Path) -> None:
    finished = srl_rlvr("train", trained.run_file, "--out", "out", "--set", "learner.workers=2", cwd=tmp_path)
    assert finished.code == 0, finished.err
    one, two = metrics(trained.out), metrics(tmp_path / "out")
    for alone, together in zip(one[:2], two[:2], strict=True):  # the warm-up samples nothing: the same batches
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    assert [(row["stage"], row["step"]) for row in one] == [(row["stage"], row["step"]) for row in two]
    assert all(row["divergence"] < 1e-6 for row in two if row["divergence"] is not None)
    assert finished.survivors() == []
