"""Whether a run may be resumed: the same settings, problems and base model as before, compared by content.

Paths do not count, and neither do keys that decide where or how fast the same thing is computed. Knows configs, tables
and files; it starts nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from srl_rlvr.config import RunConfig

# Keys, or whole sections, that change nothing of what is computed. Data and base model are compared by content.
_FREE = (
    "name", "data", "verifiers", "model.base", "cluster", "tracking", "verifier", "checkpoint_every",
    "evaluation.on_stages", "engine.start_deadline_s", "engine.call_deadline_s", "learner.start_deadline_s",
    "learner.call_deadline_s", "learner.max_restarts",
)  # fmt: skip
# These leave the algorithm as it is, but change the order or the rounding of its sums, its draws, or when it looks.
_INEXACT = (
    "max_staleness", "engine", "learner.workers", "learner.strategy", "learner.tokens_per_microbatch",
    "learner.activation_checkpointing", "learner.threads", "evaluation.every", "evaluation.patience",
)  # fmt: skip

_PARTS = ("train", "dev", "held-out")
# Columns of an Example, by what a person calls them.
_CONTENTS = {
    "question": ("model_type", "prompt", "images", "candidates", "difficulty"),
    "steps": ("steps",),
    "answer or verifier": ("reference", "verifier", "metadata"),
}
_FINGERPRINTS = pa.schema([("part", pa.string()), ("id", pa.string()), *((name, pa.uint64()) for name in _CONTENTS)])

# What a library writes into a config about itself.
_NOT_CONTENT = ("transformers_version", "_name_or_path", "name_or_path", "__version__")
_SAMPLE_BYTES, _SAMPLES = 4096, 16
_LARGEST_HEADER = 100_000_000  # of a safetensors file, as the format has it


@dataclass(frozen=True)
class Change:
    key: str
    before: Any
    now: Any
    is_allowed: bool  # though the run does not end bit for bit as without the interruption

    def __str__(self) -> str:
        return f"'{self.key}' (it was {_short(self.before)}, and is {_short(self.now)})"


def changes(before: RunConfig, now: RunConfig) -> list[Change]:
    """The keys that differ, apart from those that change nothing of what is computed."""
    old, new = (dict(_leaves(config.model_dump(mode="json"))) for config in (before, now))
    found = []
    for key in dict.fromkeys([*new, *old]):
        if old.get(key) != new.get(key) and not _is_in(key, _FREE):
            found.append(Change(key, old.get(key), new.get(key), _is_in(key, _INEXACT)))
    return found


def _is_in(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value); stages by their label, whose order is a value of its own."""
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        labels = [item.get("name") or item.get("kind") or str(i) for i, item in enumerate(tree)]
        yield prefix, labels
        tree = dict(zip(labels, tree, strict=True))
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def fingerprints(train: pa.Table, dev: pa.Table, held_out: pa.Table) -> pa.Table:
    """A row for each problem: its part, its id, and a digest of each of its contents."""
    rows: dict[str, list[Any]] = {name: [] for name in _FINGERPRINTS.names}
    for part, table in zip(_PARTS, (train, dev, held_out), strict=True):
        rows["part"] += [part] * table.num_rows
        rows["id"] += table["id"].to_pylist()
        for batch in table.to_batches(max_chunksize=1000):
            for example in batch.to_pylist():
                for name, columns in _CONTENTS.items():
                    rows[name].append(_digest([example[column] for column in columns]))
    return pa.table(rows, schema=_FINGERPRINTS)


def _digest(values: Any) -> int:
    digest = xxhash.xxh3_64()
    for value in values:
        for part in value if isinstance(value, list) else [value]:
            digest.update(part if isinstance(part, bytes) else repr(part).encode())
            digest.update(b"\0")
        digest.update(b"\1")
    return digest.intdigest()


def data_digest(found: pa.Table, train: pa.Table) -> str:
    """One digest of all problems in their order, and of which of those to learn from belong to one task."""
    digest = xxhash.xxh3_128()
    for name in found.column_names:
        digest.update(repr(found[name].to_pylist()).encode())
    names = dict.fromkeys(train["task"].to_pylist())
    tasks = {name: number for number, name in enumerate(names)}  # a task is named for a file, which may be renamed
    digest.update(repr([tasks[name] for name in train["task"].to_pylist()]).encode())
    return digest.hexdigest()


def first_change(before: pa.Table, found: pa.Table, *tables: pa.Table) -> str:
    """The first problem that differs, in words; `tables` are train, dev and held-out as they are now."""
    places = [_place(text) for table in tables for text in table["provenance"].to_pylist()]
    old, new = before.to_pylist(), found.to_pylist()
    known = {(row["part"], row["id"]) for row in old}
    for row, (then, now) in enumerate(zip(old, new, strict=False)):
        if then == now:
            continue
        if then["id"] == now["id"] and then["part"] == now["part"]:
            what = next(name for name in _CONTENTS if then[name] != now[name])
            return f"{now['part']} problem {now['id']} ({places[row]}) has another {what}"
        if (now["part"], now["id"]) in known:
            return f"{then['part']} problem {then['id']} is missing, or comes in another place"
        return f"{now['part']} problem {now['id']} ({places[row]}) is new"
    if len(old) > len(new):
        return f"{old[len(new)]['part']} problem {old[len(new)]['id']} is missing"
    if len(new) > len(old):
        return f"{new[len(old)]['part']} problem {new[len(old)]['id']} ({places[len(old)]}) is new"
    return "the problems are divided into other tasks"


def _place(provenance: str) -> str:
    found = json.loads(provenance)
    return f"{found['source']}, row {found['row']}" if {"source", "row"} <= found.keys() else provenance


def write_fingerprints(path: Path, found: pa.Table) -> None:
    pq.write_table(found, path)


def read_fingerprints(path: Path) -> pa.Table | None:
    """None if there is none that this version can read."""
    try:
        return pq.read_table(path, schema=_FINGERPRINTS)
    except (OSError, ValueError):
        return None


def model_digest(folder: Path) -> str:
    """A digest of a model's config, tokenizer and weights; of large tensors some bytes count, evenly spaced."""
    digest = xxhash.xxh3_128()
    files = [path for part in _folders(folder) for path in sorted(part.glob("[!.]*")) if path.is_file()]
    suffix = ".safetensors" if any(path.suffix == ".safetensors" for path in files) else ".bin"
    for path in files:
        if path.suffix == suffix:
            _add_weights(digest, path)
        elif path.suffix == ".json" and path.name != "model_card.json" and not path.name.endswith(".index.json"):
            _add_json(digest, path)
        elif path.suffix in (".jinja", ".model") or path.name in ("vocab.txt", "merges.txt"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _folders(folder: Path) -> list[Path]:
    """The model's own and, of sentence-transformers, those of its modules: others may lie below it."""
    try:
        modules = json.loads((folder / "modules.json").read_text())
        below = sorted({folder / str(module["path"]) for module in modules})
    except (OSError, ValueError, TypeError, KeyError):
        below = []
    return [folder, *(part for part in below if part != folder)]


def _add_json(digest: Any, path: Path) -> None:
    text = path.read_bytes()
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if isinstance(tree, dict):
        content = {key: value for key, value in tree.items() if key not in _NOT_CONTENT}
        text = json.dumps(content, sort_keys=True).encode()
    digest.update(text)


def _add_weights(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        spans = [(0, size)]
        if 8 + length <= size and length <= _LARGEST_HEADER:
            header = file.read(length)
            digest.update(header)
            spans = _tensors(header, 8 + length, size) or spans
        digest.update(repr(size).encode())
        for begin, end in spans:
            for place in _places(begin, end):
                file.seek(place)
                digest.update(file.read(min(_SAMPLE_BYTES, end - place)))


def _tensors(header: bytes, offset: int, size: int) -> list[tuple[int, int]]:
    """Where each tensor begins and ends in the file; nothing if the header is not one of safetensors."""
    try:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        spans = [(offset + entry["data_offsets"][0], offset + entry["data_offsets"][1]) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return []
    return [span for span in sorted(spans) if 0 <= span[0] < span[1] <= size]


def _places(begin: int, end: int) -> list[int]:
    if end - begin <= _SAMPLES * _SAMPLE_BYTES:
        return list(range(begin, end, _SAMPLE_BYTES))
    return [begin + (end - begin - _SAMPLE_BYTES) * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
