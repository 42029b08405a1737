"""The rollouts that a run keeps for people, in Parquet parts of bounded size.

Memory stays flat however long the run is: rows are written as they come, and a report reads a sample of them. Each part
is named for the number of its first row. It knows rows and files, and must not know what a rollout is worth.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from srl_rlvr.errors import RunError
from srl_rlvr.reporting.report import ROLLOUT_VIEW

# A part is filled up to this size on disk: a checkpoint rewrites one part at most.
_PART_BYTES = 2 * 2**20
# Rows wait in memory for the next checkpoint up to this size.
_WAITING_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Sampled:
    rows: pa.Table  # ROLLOUT_VIEW
    steps: int  # that the rows are of
    all_steps: int  # that the log has rows of


class RolloutLog:
    """Append rows, `flush` at each checkpoint, and `cut` back to the checkpoint that a run is resumed from."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows = 0
        self._first_of_part = 0  # of the part that is being filled
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises RunError if they cannot be written."""
        if rows:
            table = pa.Table.from_pylist(list(rows), schema=ROLLOUT_VIEW)
            self._waiting.append(table)
            self._waiting_bytes += table.nbytes
            self.rows += len(rows)
            if self._waiting_bytes >= _WAITING_BYTES:
                self.flush()

    def flush(self) -> int:
        """Write what waits; returns the number of rows on disk. Raises RunError if they cannot be written."""
        if self._waiting:
            path = self._path(self._first_of_part)
            try:
                before = [pq.read_table(path)] if path.exists() else []
                self._write(path, pa.concat_tables([*before, *self._waiting]))
            except OSError as error:
                raise RunError(
                    f"cannot write rollouts to {self.folder}: {error.strerror or error}; free some space and go on "
                    "with --resume, or set tracking.rollouts_per_step = 0"
                ) from None
            self._waiting, self._waiting_bytes = [], 0
            if path.stat().st_size >= _PART_BYTES:
                self._first_of_part = self.rows
        return self.rows

    def cut(self, rows: int) -> None:
        """Remove every row after the first `rows`: they are of steps that the run makes again."""
        self._waiting, self._waiting_bytes = [], 0
        self.rows = self._first_of_part = rows
        for first, path in self._parts():
            if first >= rows:
                path.unlink()
                continue
            if first + pq.read_metadata(path).num_rows > rows:
                self._write(path, pq.read_table(path).slice(0, rows - first))
            if path.stat().st_size < _PART_BYTES:
                self._first_of_part = first
            else:
                self._first_of_part = rows

    def read(self) -> pa.Table:
        """All rows that are on disk, in order."""
        parts = [pq.read_table(path) for _, path in self._parts()]
        return pa.concat_tables(parts) if parts else ROLLOUT_VIEW.empty_table()

    def sample(self, most_rows: int, most_tokens: int) -> Sampled:
        """Rows of whole steps, evenly spaced, with the first and the last step of every stage.

        They keep within the bounds unless those first and last steps alone exceed them.
        """
        steps: dict[tuple[str, int], list[int]] = {}  # rows, tokens
        for part in self._columns("stage", "step", "logprobs"):
            lengths = pc.list_value_length(part["logprobs"]).to_pylist()  # type: ignore[attr-defined]
            for stage, step, tokens in zip(part["stage"].to_pylist(), part["step"].to_pylist(), lengths, strict=True):
                counts = steps.setdefault((stage, step), [0, 0])
                counts[0] += 1
                counts[1] += tokens
        chosen = _spaced(list(steps), _share(steps.values(), most_rows, most_tokens))
        found = []
        for part in self._columns(*ROLLOUT_VIEW.names):
            keys = zip(part["stage"].to_pylist(), part["step"].to_pylist(), strict=True)
            rows = part.filter(pa.array([key in chosen for key in keys], pa.bool_()))
            if rows.num_rows:
                found.append(rows)
        rows = pa.concat_tables(found) if found else ROLLOUT_VIEW.empty_table()
        return Sampled(rows, len(chosen), len(steps))

    def _columns(self, *names: str) -> Iterator[pa.Table]:
        for _, path in self._parts():
            yield pq.read_table(path, columns=list(names))

    def _parts(self) -> list[tuple[int, Path]]:
        found = ((re.fullmatch(r"rows-(\d+)\.parquet", path.name), path) for path in self.folder.glob("rows-*"))
        return sorted((int(match[1]), path) for match, path in found if match)

    def _path(self, first: int) -> Path:
        return self.folder / f"rows-{first:010d}.parquet"

    def _write(self, path: Path, table: pa.Table) -> None:
        """Replace the part: a crash leaves the old one or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        try:
            pq.write_table(table, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _share(counts: Any, most_rows: int, most_tokens: int) -> float:
    """The share of the steps that keeps within both bounds."""
    rows, tokens = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return min(1.0, most_rows / max(rows, 1), most_tokens / max(tokens, 1))


def _spaced(steps: list[tuple[str, int]], share: float) -> set[tuple[str, int]]:
    if share >= 1:
        return set(steps)
    first = {stage: (stage, step) for stage, step in reversed(steps)}
    last = {stage: (stage, step) for stage, step in steps}
    count = max(0, int(share * len(steps)) - len({*first.values(), *last.values()}))
    places = np.linspace(0, len(steps) - 1, count).round().astype(int)
    return {*first.values(), *last.values(), *(steps[place] for place in places)}
