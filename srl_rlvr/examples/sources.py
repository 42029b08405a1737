"""The problems of a run: every `[[data]]` source read or generated, train and held-out kept apart by content hash."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from srl_rlvr import model_types, records
from srl_rlvr.config import SourceConfig
from srl_rlvr.errors import InputError
from srl_rlvr.examples import generated
from srl_rlvr.examples.files import WHOLE, Reading

log = logging.getLogger(__name__)

_GENERATED_BY_DEFAULT = 512
_MOST_NAMED = 5


def load_all(
    sources: Sequence[SourceConfig], seed: int, model_type: str = "task_llm", verifiers: Sequence[str] = ()
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """(train, dev, held-out) Example tables of all sources, without a common problem.

    `verifiers` are the user's own that rows may name.
    Raises InputError where a source is missing, wrong or empty.
    """
    declared, paths = model_types.find(model_type), [Path(source.path) for source in sources if source.path]
    card = declared.card(paths, []) if declared.one_card and len(paths) > 1 else None
    how = Reading(card=card, verifiers=tuple(verifiers))
    parts = [_generated(source, seed) if source.family else _from_files(source, declared, how) for source in sources]
    _say_contradictions([table for tables in parts for table in tables])
    ranks, taken = declared.policy == "ranking", set[str]()
    held_out, dev, train = (
        _distinct(records.concat("Example", [tables[i] for tables in parts]), taken, ranks) for i in (2, 1, 0)
    )
    if not train.num_rows:
        raise InputError("no problem is left to train on: all of them are held out; lower data.held_out or data.dev")
    return train, dev, held_out


def _say_contradictions(tables: Sequence[pa.Table]) -> None:
    """Log the rows of different sources or files that ask the same and have different answers."""
    first: dict[str, tuple[str, str]] = {}
    found: list[str] = []
    for table in tables:
        columns = (table[name].to_pylist() for name in ("id", "reference", "provenance"))
        for example_id, reference, provenance in zip(*columns, strict=True):
            known = first.setdefault(example_id, (reference, provenance))
            if known[0] != reference:
                places = (json.loads(of) for of in (known[1], provenance))
                found.append(" and ".join(f"{of.get('source')} row {of.get('row')}" for of in places))
    if found:
        more = f" (and {len(found) - _MOST_NAMED} more)" if len(found) > _MOST_NAMED else ""
        log.warning("the same question has different answers in %s%s: correct or delete one of each pair",
                    ", ".join(found[:_MOST_NAMED]), more)  # fmt: skip


def _generated(source: SourceConfig, seed: int) -> tuple[pa.Table, pa.Table, pa.Table]:
    return generated.generate_split(
        source.family,
        train=source.train or _GENERATED_BY_DEFAULT,
        held_out=source.held_out,
        dev=source.dev,
        seed=seed,
        params=source.params,
    )


def _from_files(
    source: SourceConfig, declared: model_types.ModelType, how: Reading
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """The card of `how` says what may be asked for where that is known of more than this source.

    Which problems are set apart, and which are taken where not all are, is drawn: files are often sorted by label.

    The draw is the same for every seed of a run, so that all are judged by the same problems.
    """
    path = Path(source.path)
    reading = replace(how, candidates=source.candidates, skip_bad=source.skip_bad, ordered=source.ordered)
    whole = declared.load(path, "train", reading)
    order = _drawn(whole)
    as_judged = replace(reading, candidates=WHOLE.candidates)
    if source.held_out_path or path.is_dir():
        if source.held_out_path and how.card is None:  # what may be asked for is known of what is trained on
            as_judged = replace(as_judged, card=declared.card([path], []))
        judged = declared.load(Path(source.held_out_path or path), "dev", as_judged)
        held_out = _rows(judged, _drawn(judged)[: source.held_out])
    else:
        order, last = _split_end(order, source.held_out, path, "data.held_out", "lower it or name a held_out_path")
        held_out = _rows(whole, last)
        if declared.policy == "ranking":  # with all of its candidates, as they come
            held_out = _same_rows(held_out, declared.load(path, "dev", as_judged))
    order, dev = _split_end(order, source.dev, path, "data.dev", "lower it")
    if source.with_steps or declared.policy == "ranking":  # nothing answers what is out of scope
        answered = pc.greater(pc.list_value_length(whole["steps"]), 0).to_numpy()[order]  # type: ignore[attr-defined]
        if declared.calibrates and source.dev:  # all of it tells where the threshold is, as none is trained on
            dev = np.concatenate([dev, order[~answered]])
        order = order[answered]
    set_apart = _rows(whole, dev)
    if source.dev and source.dev_candidates:
        asked = replace(reading, candidates=source.dev_candidates)
        set_apart = _same_rows(set_apart, declared.load(path, "train", asked))
    return _rows(whole, order[: source.train]), set_apart, held_out


def _drawn(examples: pa.Table) -> np.ndarray:
    """Row numbers in an order that is always the same."""
    return np.random.default_rng(0).permutation(examples.num_rows)


def _rows(examples: pa.Table, rows: np.ndarray) -> pa.Table:
    """These rows, in the order of the file."""
    return examples.take(pa.array(np.sort(rows)))


def _same_rows(examples: pa.Table, of: pa.Table) -> pa.Table:
    """The rows of the file that these Examples come from, as Examples `of` another reading."""
    return of.filter(pc.is_in(of["provenance"], examples["provenance"].combine_chunks()))  # type: ignore[attr-defined]


def _split_end(order: np.ndarray, last: int, path: Path, key: str, remedy: str) -> tuple[np.ndarray, np.ndarray]:
    """(all but the `last` rows, those). Raises InputError where the first would be empty."""
    n = len(order)
    if n <= last:
        raise InputError(f"{path}: {n} problems, and {key} is {last}: {remedy}")
    return order[: n - last], order[n - last :]


def _distinct(examples: pa.Table, taken: set[str], ranks: bool) -> pa.Table:
    """Each problem that no other split has `taken`, once. A ranking's is its question, whatever its candidates."""
    ids = examples["id"].to_pylist()
    problems = [records.folded(prompt) for prompt in examples["prompt"].to_pylist()] if ranks else ids
    rows, own = [], set[str]()
    for row, (example_id, problem) in enumerate(zip(ids, problems, strict=True)):
        if problem not in taken and example_id not in own:
            own.add(example_id)
            rows.append(row)
    taken.update(problems)
    return examples.take(pa.array(rows, pa.int64()))
