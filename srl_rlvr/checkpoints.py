"""Checkpoints of a run: where it stands, its metrics so far, and (written by the learner) its weights and optimizer.

A checkpoint is written beside the others under a hidden name and renamed when it is whole, so a folder with a
checkpoint's name is always complete. Knows files only.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from srl_rlvr.errors import InputError, RunError
from srl_rlvr.reporting.report import ROLLOUT_VIEW

_KEEP = 2


@dataclass
class State:
    """Where a run stands. With the seed, these counters say everything about what comes next."""

    stage: int = 0  # index into config.stages
    step: int = 0  # steps done in that stage
    selector: dict[str, Any] = field(default_factory=dict)  # what was drawn in that stage, and what that earned
    version: int = 0  # updates of the policy over the whole run
    sampled_tokens: int = 0
    seconds: float = 0.0
    peak_memory_gib: float = 0.0
    held_out: dict[str, list[float]] = field(default_factory=dict)  # label: score, low, high
    best_step: int = -1  # steps done when the present stage was best on the dev problems; -1 where none were looked at
    best_score: float = -1.0
    best: str = "best"  # the folder beside the checkpoints that has those weights
    data: str = ""  # a digest of all problems
    counted: int = 0  # held-out problems that the last evaluation's mean is over
    tracking_id: str = ""
    hardest: dict[str, list[int]] = field(default_factory=dict)  # candidates by example in this stage, best first
    thoughts: dict[str, list[int]] | None = None  # the policy's own by step prompt in this stage, once they are drawn
    pending: list[list[int]] = field(default_factory=list)  # rows drawn for each next batch and not yet learned from


@dataclass
class History:
    """Rows for metrics.parquet and for the report's rollout viewer."""

    metrics: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[dict[str, Any]] = field(default_factory=list)

    def metrics_table(self) -> pa.Table:
        """One row an update; a metric that a stage does not have is null there."""
        names = dict.fromkeys(name for row in self.metrics for name in row)
        types = {"stage": pa.string(), "step": pa.int64(), "update": pa.int64()}
        columns = {n: pa.array([row.get(n) for row in self.metrics], types.get(n, pa.float64())) for n in names}
        return pa.table(columns or {name: pa.array([], type_) for name, type_ in types.items()})

    def rollout_table(self) -> pa.Table:
        return pa.Table.from_pylist(self.rollouts, schema=ROLLOUT_VIEW)


def write(out: Path, state: State, history: History, config: str, save_learner: Callable[[Path], None]) -> Path:
    """One whole checkpoint under `out/checkpoints`; older ones go once it stands. Raises as `_in_one_piece`."""

    def fill(folder: Path) -> None:
        save_learner(folder)
        pq.write_table(history.metrics_table(), folder / "metrics.parquet")
        pq.write_table(history.rollout_table(), folder / "rollouts.parquet")
        (folder / "config.json").write_text(config)
        (folder / "state.json").write_text(json.dumps(asdict(state), indent=2))

    final = out / "checkpoints" / f"update-{state.version:06d}-stage-{state.stage}"
    _in_one_piece(out, final, fill)
    for old in _complete(out)[:-_KEEP]:
        shutil.rmtree(old)
    _drop_bests(out, state.best)
    return final


def write_best(out: Path, version: int, save_learner: Callable[[Path], None]) -> str:
    """The learner's present state, in place of older ones but that of the newest checkpoint, which a resumed run may
    want; returns the folder's name. Raises as `_in_one_piece`."""
    final = out / f"best-{version:06d}"
    _in_one_piece(out, final, save_learner)
    newest = latest(out)
    _drop_bests(out, final.name, *([read(newest)[0].best] if newest else []))
    return final.name


def _drop_bests(out: Path, *kept: str) -> None:
    for folder in out.glob("best-*"):
        if folder.name not in kept:
            shutil.rmtree(folder)


def _in_one_piece(out: Path, final: Path, fill: Callable[[Path], None]) -> None:
    """Have a folder beside `final` filled and give it that name once it is whole.

    Raises RunError where it could not be written: then nothing of it is left and what stood there stays.
    """
    partial = final.with_name(f".{final.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except (OSError, RunError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
        free_gib = shutil.disk_usage(place).free / 2**30
        last = latest(out)
        kept = f"the last good one is {last.name}" if last else "there is none yet"
        raise RunError(
            f"cannot write checkpoint {final}: {str(error).strip().splitlines()[0]} ({free_gib:.1f} GiB free); "
            f"{kept}; free some space and go on with --resume"
        ) from None


def latest(out: Path) -> Path | None:
    complete = _complete(out)
    return complete[-1] if complete else None


def read(folder: Path) -> tuple[State, History]:
    """Raises InputError where the folder does not hold a checkpoint of this version."""
    try:
        state = State(**json.loads((folder / "state.json").read_text()))
        metrics = pq.read_table(folder / "metrics.parquet").to_pylist()
        rollouts = pq.read_table(folder / "rollouts.parquet").to_pylist()
    except (OSError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"checkpoint {folder} cannot be read: {reason}; delete it to go on from the one before"
        ) from None
    return state, History([{k: v for k, v in row.items() if v is not None} for row in metrics], rollouts)


def _complete(out: Path) -> list[Path]:
    folders = (path for path in (out / "checkpoints").glob("update-*") if path.is_dir())
    return sorted(folders, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
