"""The looks of a trial: read every second from what its run has saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from srl_rlvr import checkpoints
from srl_rlvr.checkpoints import History, State
from srl_rlvr.cli import tune
from srl_rlvr.errors import InputError


def write(out: Path, **values: Any) -> Path:
    return checkpoints.write(out, State(**values), History(), "{}\n", lambda folder: None)


def test_the_best_score_so_far_comes_from_the_state_alone(tmp_path: Path) -> None:
    assert tune._looks(tmp_path) == []
    folder = write(tmp_path, version=9, dev_scores=[[2, 0.5], [4, 0.25], [6, 0.75]])
    (folder / "metrics.parquet").unlink()
    assert tune._looks(tmp_path) == [(2, 0.5), (4, 0.5), (6, 0.75)]


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, version=1)
    latest = checkpoints.latest

    def vanishing(out: Path) -> Path | None:
        found = latest(out)
        shutil.rmtree(folder)
        return found

    monkeypatch.setattr(checkpoints, "latest", vanishing)
    assert tune._looks(tmp_path) == []
    monkeypatch.undo()
    (write(tmp_path, version=2) / "state.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        tune._looks(tmp_path)
