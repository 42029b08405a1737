from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from srl_rlvr.errors import RunError
from srl_rlvr.reporting import rollout_log
from srl_rlvr.reporting.report import ROLLOUT_VIEW
from srl_rlvr.reporting.rollout_log import RolloutLog


def row(step: int, index: int = 0, stage: str = "rlvr", tokens: int = 3) -> dict[str, Any]:
    return {
        "stage": stage, "step": step, "prompt_id": f"p{step}", "sample_index": index, "prompt": "1 + 1",
        "reference": "2", "tokens": [f"{step}-{token}" for token in range(tokens)], "logprobs": [-0.5] * tokens,
        "advantage": 1.0, "reward": 1.0, "outcome": "scored", "components": "{}", "detail": "", "finish_reason": "stop",
    }  # fmt: skip


def steps_of(rows: pa.Table) -> list[int]:
    return rows["step"].to_pylist()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_log, "_PART_BYTES", 6000)


def filled(folder: Path, steps: int, every: int = 2) -> RolloutLog:
    log = RolloutLog(folder)
    for step in range(steps):
        log.append([row(step, index) for index in range(2)])
        if step % every == every - 1:
            log.flush()
    log.flush()
    return log


def test_rows_come_back_in_their_order_out_of_parts_of_bounded_size(tmp_path: Path, small_parts: None) -> None:
    log = filled(tmp_path, 200)
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert len(sizes) > 2 and max(sizes) < 20_000
    assert steps_of(log.read()) == [step for step in range(200) for _ in range(2)]
    assert log.rows == 400 and log.read().schema == ROLLOUT_VIEW


@pytest.mark.parametrize("kept", [0, 1, 7, 150, 399, 400])
def test_a_log_that_is_cut_goes_on_as_if_nothing_had_been_after(tmp_path: Path, small_parts: None, kept: int) -> None:
    whole = filled(tmp_path / "whole", 200).read()
    filled(tmp_path / "cut", 200)
    log = RolloutLog(tmp_path / "cut")
    log.cut(kept)
    assert log.read() == whole[:kept]
    log.append(whole[kept:].to_pylist())
    assert log.flush() == 400
    assert log.read() == whole


def test_what_was_not_flushed_is_not_there_for_the_next_life(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    log.append([row(0)])
    assert log.flush() == 1
    log.append([row(1)])
    again = RolloutLog(tmp_path)
    again.cut(1)
    assert steps_of(again.read()) == [0]


def test_a_run_without_rollouts_writes_no_folder(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts")
    log.cut(0)
    log.append([])
    assert log.flush() == 0 and log.read().num_rows == 0 and log.sample(9, 9).rows.num_rows == 0
    assert not (tmp_path / "rollouts").exists()


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "rows-notes.parquet").touch()
    log = RolloutLog(tmp_path)
    log.cut(0)
    assert (tmp_path / "rows-notes.parquet").exists() and log.read().num_rows == 0


def test_a_disk_that_is_full_is_one_line_and_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = filled(tmp_path, 4)
    log.append([row(9)])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rollout_log.pq, "write_table", full)
    with pytest.raises(RunError, match="cannot write rollouts to .*No space left.*--resume") as caught:
        log.flush()
    assert "\n" not in str(caught.value)
    assert RolloutLog(tmp_path).read().num_rows == 8


def test_a_sample_keeps_within_its_bounds_and_has_the_ends_of_every_stage(tmp_path: Path, small_parts: None) -> None:
    log = RolloutLog(tmp_path)
    for stage, steps in (("srl", 3), ("rlvr", 500)):
        for step in range(steps):
            log.append([row(step, index, stage) for index in range(2)])
    log.flush()
    everything = log.sample(10_000, 10_000)
    assert everything.rows == log.read() and everything.steps == everything.all_steps == 503
    for bounds in ((100, 10_000), (10_000, 300)):
        found = log.sample(*bounds)
        keys = {(each["stage"], each["step"]) for each in found.rows.to_pylist()}
        assert {("srl", 0), ("srl", 2), ("rlvr", 0), ("rlvr", 499)} <= keys
        assert found.rows.num_rows == 2 * found.steps <= 100 and found.steps > 40 and found.all_steps == 503
        gaps = [step for stage, step in sorted(keys) if stage == "rlvr"]
        assert max(b - a for a, b in zip(gaps, gaps[1:], strict=False)) < 30


def test_memory_is_flat_over_a_thousand_steps(tmp_path: Path) -> None:
    """Of a run that makes a checkpoint every hundred steps; the rows alone are far more than what is allowed."""
    log = RolloutLog(tmp_path)
    tracemalloc.start()
    seen: list[tuple[int, int, int]] = []
    for step in range(1000):
        log.append([row(step, index, tokens=16) for index in range(8)])
        if step % 100 == 99:
            log.flush()
            gc.collect()
            seen.append((tracemalloc.get_traced_memory()[0], len(gc.get_objects()), pa.total_allocated_bytes()))
    tracemalloc.stop()
    python, objects, arrow = zip(*seen, strict=True)
    assert max(python) - python[0] < 2**20
    assert max(objects) - objects[0] < 1000
    assert max(arrow) - min(arrow) < 8 * 2**20
    assert log.rows == 8000
