"""The problems of a run: every `[[data]]` source read or generated, train and held-out kept apart by content hash."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from srl_rlvr import model_types, records
from srl_rlvr.config import SourceConfig
from srl_rlvr.errors import InputError
from srl_rlvr.examples import generated
from srl_rlvr.examples.files import Reading

_GENERATED_BY_DEFAULT = 512


def load_all(
    sources: Sequence[SourceConfig], seed: int, model_type: str = "task_llm"
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """(train, dev, held-out) Example tables of all sources, without a common id.

    Raises InputError where a source is missing, wrong or empty.
    """
    parts = [_generated(source, seed) if source.family else _from_files(source, model_type) for source in sources]
    taken: set[str] = set()
    held_out, dev, train = (
        _distinct(records.concat("Example", [tables[i] for tables in parts]), taken) for i in (2, 1, 0)
    )
    if not train.num_rows:
        raise InputError("no problem is left to train on: all of them are held out; lower data.held_out or data.dev")
    return train, dev, held_out


def _generated(source: SourceConfig, seed: int) -> tuple[pa.Table, pa.Table, pa.Table]:
    return generated.generate_split(
        source.family,
        train=source.train or _GENERATED_BY_DEFAULT,
        held_out=source.held_out,
        dev=source.dev,
        seed=seed,
        params=source.params,
    )


def _from_files(source: SourceConfig, model_type: str) -> tuple[pa.Table, pa.Table, pa.Table]:
    path, load = Path(source.path), model_types.find(model_type).load
    judged = Reading(limit=source.held_out, skip_bad=source.skip_bad)
    train = load(path, "train", Reading(candidates=source.candidates, skip_bad=source.skip_bad))
    if source.held_out_path:
        held_out = load(Path(source.held_out_path), "dev", judged)
    elif path.is_dir():
        held_out = load(path, "dev", judged)
    else:
        train, held_out = _split_end(train, source.held_out, path, "data.held_out", "lower it or name a held_out_path")
    train, dev = _split_end(train, source.dev, path, "data.dev", "lower it")
    if source.with_steps or model_types.find(model_type).policy == "ranking":  # nothing answers what is out of scope
        train = train.filter(pc.greater(pc.list_value_length(train["steps"]), 0))  # type: ignore[attr-defined]
    return train.slice(0, source.train), dev, held_out


def _split_end(examples: pa.Table, last: int, path: Path, key: str, remedy: str) -> tuple[pa.Table, pa.Table]:
    """(all but the `last` rows, those). Raises InputError where the first would be empty."""
    n = examples.num_rows
    if n <= last:
        raise InputError(f"{path}: {n} problems, and {key} is {last}: {remedy}")
    return examples.slice(0, n - last), examples.slice(n - last)


def _distinct(examples: pa.Table, taken: set[str]) -> pa.Table:
    rows = []
    for row, example_id in enumerate(examples["id"].to_pylist()):
        if example_id not in taken:
            taken.add(example_id)
            rows.append(row)
    return examples.take(pa.array(rows, pa.int64()))
