"""Actors die by kill -9 in the middle of a run: it goes on, and ends with the very model of an undisturbed run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from cli_runs import Command, metrics, rollouts, same_results, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
# Long enough for a call to be under way on a stopped process, or for one to be missed.
BUSY_S = 3.0


def test_a_generator_killed_in_flight_and_one_that_restarts_unnoticed(undisturbed: Any, tmp_path: Path) -> None:
    run = Command(["train", undisturbed.run_file, "--out", "out"], tmp_path)
    # Unnoticed: the learner is held in the checkpoint after the warm-up's evaluation, and nobody asks the generator.
    run.until("^evaluating sft")
    learner = run.actor("RayTrainWorker")
    learner.suspend()
    run.until("^sft: ")
    time.sleep(1)
    first = run.actor("Generator")
    first.kill()
    second = _successor(run, "Generator", first)
    time.sleep(BUSY_S)
    learner.resume()
    # In flight: it stops, is given prompts, and dies over them.
    run.until("^srl +2/4")
    second.suspend()
    time.sleep(BUSY_S)
    second.kill()
    finished = run.finish()
    assert finished.code == 0, finished.err
    same_results(tmp_path / "out", undisturbed.out)
    assert finished.survivors() == []


def test_a_generator_killed_while_the_learner_updates(undisturbed: Any, tmp_path: Path) -> None:
    settings = ("max_staleness=1", "engine.threads=1", "learner.threads=1", "stages.rlvr.steps=80",
                "stages.rlvr.learning_rate=1e-9")  # fmt: skip
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    run = Command(["train", undisturbed.run_file, "--out", "out", *overrides], tmp_path)
    run.until("^rlvr +1/80")
    generator = run.actor("Generator")
    generator.suspend()
    time.sleep(BUSY_S)
    generator.kill()
    finished = run.finish()
    assert finished.code == 0, finished.err
    ages = [row["staleness"] for row in metrics(tmp_path / "out") if row["stage"] == "rlvr"]
    assert len(ages) == 80 and all(0 <= age <= 1 for age in ages)
    kept = [row for row in rollouts(tmp_path / "out") if row["stage"] == "rlvr"]
    asked = [row["prompt_id"] for row in kept if row["sample_index"] == 0]
    assert len(kept) == 4 * len(asked) >= 4 * 240
    # Each epoch visits all 24 problems.
    epochs = {tuple(sorted(asked[first : first + 24])) for first in range(0, 240, 24)}
    assert epochs == {tuple(sorted(set(asked)))} and len(set(asked)) == 24
    assert finished.survivors() == []


def test_a_learner_worker_starts_anew_from_the_checkpoint_and_replays(undisturbed: Any, tmp_path: Path) -> None:
    run = Command(["train", undisturbed.run_file, "--out", "out"], tmp_path)
    run.until("^srl +3/4")  # one update after the last checkpoint
    run.actor("RayTrainWorker").kill()
    finished = run.finish()
    assert finished.code == 0, finished.err
    same_results(tmp_path / "out", undisturbed.out)
    assert finished.survivors() == []


def test_a_verifier_killed_in_flight(undisturbed: Any, tmp_path: Path) -> None:
    run = Command(["train", undisturbed.run_file, "--out", "out"], tmp_path)
    run.until("^srl +1/4")
    verifier = run.actor("Verifier")
    pool = verifier.children()
    verifier.suspend()
    time.sleep(BUSY_S)
    verifier.kill()
    finished = run.finish()
    assert finished.code == 0, finished.err
    same_results(tmp_path / "out", undisturbed.out)
    assert len(pool) == 2
    assert finished.survivors() == []


def _successor(run: Command, name: str, dead: psutil.Process) -> psutil.Process:
    return wait_for(
        lambda: next((process for process in run.actors(name) if process.pid != dead.pid), None), f"a new {name}", 60
    )
