"""Checkpoints of a run: where it stands, its metrics so far, and (written by the learner) its weights and optimizer.

A checkpoint is written beside the others under a hidden name and renamed when it is whole, so a folder with a
checkpoint's name is always complete. One of the same name is renamed first and deleted last; `recover` puts it back if
the run died in between. Knows files only.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from srl_rlvr.errors import InputError, RunError

_KEEP = 2
_FORMAT = 2  # of `State`
_OLD = ".old"  # ends the hidden name of a folder that is being replaced


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
    base: str = ""  # a digest of the base model
    rollouts: int = 0  # rows of the rollout log
    dev_scores: list[list[float]] = field(default_factory=list)  # [updates tried, score] of each evaluation on dev
    format: int = _FORMAT
    counted: int = 0  # held-out problems that the last evaluation's mean is over
    tracking_id: str = ""
    hardest: dict[str, list[int]] = field(default_factory=dict)  # candidates by example in this stage, best first
    thoughts: dict[str, list[int]] | None = None  # the policy's own by step prompt in this stage, once they are drawn
    pending: list[list[int]] = field(default_factory=list)  # rows drawn for each next batch and not yet learned from


@dataclass
class History:
    """Rows for metrics.parquet."""

    metrics: list[dict[str, Any]] = field(default_factory=list)

    def metrics_table(self) -> pa.Table:
        """One row an update; a metric that a stage does not have is null there."""
        names = dict.fromkeys(name for row in self.metrics for name in row)
        types = {"stage": pa.string(), "step": pa.int64(), "update": pa.int64()}
        columns = {n: pa.array([row.get(n) for row in self.metrics], types.get(n, pa.float64())) for n in names}
        return pa.table(columns or {name: pa.array([], type_) for name, type_ in types.items()})


def write(out: Path, state: State, history: History, config: str, save_learner: Callable[[Path], None]) -> Path:
    """One whole checkpoint under `out/checkpoints`; older ones go once it stands. Raises as `_in_one_piece`."""

    def fill(folder: Path) -> None:
        save_learner(folder)
        pq.write_table(history.metrics_table(), folder / "metrics.parquet")
        (folder / "config.json").write_text(config)
        (folder / "state.json").write_text(json.dumps(asdict(state)))

    final = out / "checkpoints" / f"update-{state.version:06d}-stage-{state.stage}"
    _in_one_piece(out, final, fill)
    for old in _complete(out)[:-_KEEP]:
        _delete(old)
    _drop_bests(out, state.best)
    return final


def write_best(out: Path, version: int, save_learner: Callable[[Path], None]) -> str:
    """The learner's present state, in place of older ones but that of the newest checkpoint, which a resumed run may
    want; returns the folder's name. Raises as `_in_one_piece`."""
    final = out / f"best-{version:06d}"
    _in_one_piece(out, final, save_learner)
    newest = latest(out)
    _drop_bests(out, final.name, *([read_state(newest).best] if newest else []))
    return final.name


def _drop_bests(out: Path, *kept: str) -> None:
    for folder in out.glob("best-*"):
        if folder.name not in kept:
            _delete(folder)


def _delete(folder: Path) -> None:
    """Hide it first: a folder that is half deleted must not have a checkpoint's name."""
    hidden = folder.with_name(f".{folder.name}")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _in_one_piece(out: Path, final: Path, fill: Callable[[Path], None]) -> None:
    """Have a folder beside `final` filled and give it that name once it is whole.

    Raises RunError where it could not be written: then nothing of it is left and what stood there stays.
    """
    partial = final.with_name(f".{final.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        replace(final, partial)
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


def replace(final: Path, filled: Path) -> None:
    """`filled` takes the name `final`. At every moment one of the two that had it is whole: see `recover`."""
    old = final.with_name(f".{final.name}{_OLD}")
    if not final.exists():
        filled.rename(final)
        return
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
    try:
        filled.rename(final)
    except OSError:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(out: Path) -> None:
    """Put back what a run that died was replacing, and delete what it had written half.

    Call it only while no other process writes to `out`.
    """
    for place in (out, out / "checkpoints"):
        for old in place.glob(f".*{_OLD}"):
            final = old.with_name(old.name[1 : -len(_OLD)])
            if not final.exists():
                old.rename(final)
            else:
                shutil.rmtree(old, ignore_errors=True)
    for partial in (*(out / "checkpoints").glob(".update-*"), *out.glob(".best-*")):
        shutil.rmtree(partial, ignore_errors=True)


def latest(out: Path) -> Path | None:
    complete = _complete(out)
    return complete[-1] if complete else None


def read(folder: Path) -> tuple[State, History]:
    """Raises InputError if the folder does not hold a checkpoint of this version."""
    state = read_state(folder)
    with _readable(folder):
        metrics = pq.read_table(folder / "metrics.parquet").to_pylist()
    return state, History([{k: v for k, v in row.items() if v is not None} for row in metrics])


def read_state(folder: Path) -> State:
    """The state alone, which is small. Raises InputError as `read` does."""
    with _readable(folder):
        found = json.loads((folder / "state.json").read_text())
        if isinstance(found, dict) and found.get("format") != _FORMAT:
            raise InputError(
                f"checkpoint {folder} was written by another version of srl-rlvr: finish the run with that version, or "
                "name another folder by --out"
            )
        return State(**found)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"checkpoint {folder} cannot be read: {reason}; delete it to go on from the one before"
        ) from None


def _complete(out: Path) -> list[Path]:
    folders = (path for path in (out / "checkpoints").glob("update-*") if path.is_dir())
    return sorted(folders, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
