from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from srl_rlvr.cli import doctor, measure
from srl_rlvr.cli.measure import Measured


def test_turns_add_up_the_time_of_either_side_and_overlap_goes_at_the_pace_of_the_slower() -> None:
    found = Measured({"vllm": 300.0, "transformers": 200.0}, 150.0, sampling_on_half=90.0, learning_on_half=120.0)
    assert found.engine == "vllm"
    assert found.turns == pytest.approx(100.0)
    assert found.overlap == 90.0


@pytest.mark.parametrize(
    "on_half, keys",
    [(90.0, 'engine.kind = "vllm", max_staleness = 0'), (101.0, "max_staleness = 1, engine.threads = ")],
)
def test_doctor_recommends_what_was_faster(monkeypatch: pytest.MonkeyPatch, on_half: float, keys: str) -> None:
    rates = Measured({"vllm": 300.0, "transformers": 200.0}, 150.0, on_half, 120.0)
    monkeypatch.setattr(measure, "measure", lambda: rates)
    *_, best = doctor._measured()
    assert best.what == "best here" and keys in best.detail


def test_doctor_says_why_a_measurement_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Iterator[Any]:
        raise RuntimeError("No module named 'gguf'")

    monkeypatch.setattr(measure, "measure", fails)
    (finding,) = doctor._measured()
    assert finding.state == "missing" and "No module named 'gguf'" in finding.detail


def test_a_process_that_ends_early_is_told_by_its_last_words() -> None:
    program = "import sys; print('loading'); sys.exit('no such model')"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    with child, pytest.raises(RuntimeError, match="no such model"):
        measure._answer(child)
