"""Ctrl-C and --resume: an interrupted run ends as an uninterrupted one, bit for bit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Command, Finished, same_results, write_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]


def test_interrupted_in_srl_and_in_rlvr_is_the_same_as_uninterrupted(trained: Any, tmp_path: Path) -> None:
    first = _interrupted(trained.run_file, tmp_path, r"^srl +2/4")
    assert re.search(r"stopped after step [234] of srl", first.err), first.err
    second = _interrupted(trained.run_file, tmp_path, r"^rlvr +1/4", "--resume")
    assert re.search(r"stopped after step [123] of rlvr", second.err), second.err
    last = Command(["train", trained.run_file, "--out", "out", "--resume"], tmp_path).finish()
    assert last.code == 0, last.err
    assert not re.search(r"^(sft|srl) ", last.out[: last.out.index("writing model")], re.MULTILINE), (
        "a step was done twice"
    )
    same_results(tmp_path / "out", trained.out)


def test_a_project_that_was_moved_goes_on_and_says_what_is_no_longer_exact(
    trained: Any, tiny_model: Path, tmp_path: Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    base = shutil.copytree(tiny_model, before / "base")
    _interrupted(write_run(before, base), before, r"^srl +2/4")
    before.rename(after)
    run_file = write_run(after, after / "base")
    (after / "note.txt").write_text("the working folder was edited")
    settings = ("name=moved", "engine.call_deadline_s=900.0", "evaluation.patience=0")
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    same = Command(["train", run_file, "--out", "out", "--resume", *overrides], after).finish()
    assert same.code == 0, same.err
    assert "has changed" not in same.out
    same_results(after / "out", trained.out)

    second = Command(["train", run_file, "--out", "out", "--resume", "--set", "engine.max_running=8"], after).finish()
    assert second.code == 0, second.err
    assert "WARNING: 'engine.max_running' (it was 64, and is 8)" in second.out


def _interrupted(run_file: Path, folder: Path, at: str, *more: str) -> Finished:
    run = Command(["train", run_file, "--out", "out", *more], folder)
    run.until(at)
    run.interrupt()
    finished = run.finish()
    assert finished.code == 130, finished.err
    assert f"srl-rlvr train {run_file} --out out --resume" in finished.err
    assert len(finished.err.splitlines()) == 1
    assert "finishing this step" in finished.out
    assert finished.survivors() == []
    return finished
