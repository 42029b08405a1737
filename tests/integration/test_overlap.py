"""max_staleness = 1: two generators sample the next batch while the learner updates; stopped and resumed."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from cli_runs import ROOT, TESTS, UPDATES, rollouts

from srl_rlvr import config as configs
from srl_rlvr.cli import session
from srl_rlvr.errors import Stopped

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture
def train(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], int]:
    """`srl-rlvr train` in this process, stopped after some updates: a machine with few cores would take turns."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(TESTS)]))
    monkeypatch.syspath_prepend(TESTS)
    monkeypatch.setattr(session, "plan", lambda config, cores: (config, ""))
    settings = ["max_staleness=1", "engine.generators=2", "engine.threads=1", "learner.threads=1", "verifier.actors=2"]
    config = configs.load(trained.run_file, settings)

    def run(updates: int, resume: bool) -> int:
        @contextlib.contextmanager
        def stop(progress: Any) -> Iterator[Callable[[], bool]]:
            asked = itertools.count(1)
            yield lambda: next(asked) >= updates

        monkeypatch.setattr(session, "_finish_on_signal", stop)
        return session.train(config, tmp_path / "out", resume, "srl-rlvr train run.toml")

    return run


def test_overlapped_stopped_and_resumed_every_prompt_is_learned_from_once(
    train: Callable[[int, bool], int], trained: Any, tmp_path: Path
) -> None:
    with pytest.raises(Stopped, match="stopped after step 2 of rlvr"):
        train(10, False)  # it is asked after each of 8 updates and between two stages
    assert train(10**6, True) == 0
    rows = pq.read_table(tmp_path / "out" / "metrics.parquet").to_pylist()
    assert [(row["stage"], row["step"]) for row in rows] == [(s, k) for s, n in UPDATES.items() for k in range(n)]
    staleness = {label: [row["staleness"] for row in rows if row["stage"] == label] for label in ("srl", "rlvr")}
    assert all(0 <= age <= 1 for ages in staleness.values() for age in ages)
    # The second batch is sampled beside the first update; so is what follows on the first batch after the resume.
    assert staleness["rlvr"] == [0.0, 1.0, 0.0, 1.0]
    assert _asked(tmp_path / "out") == _asked(trained.out)


def _asked(out: Path) -> list[tuple[Any, ...]]:
    """All of the stage whose groups always carry signal, so that nothing is drawn in addition."""
    return [(row["step"], row["prompt_id"], row["sample_index"]) for row in rollouts(out) if row["stage"] == "rlvr"]
