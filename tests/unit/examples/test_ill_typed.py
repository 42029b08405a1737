"""Whatever stands in a column, or in a list or an object in it: a row is read, or refused in one line that names it."""

from __future__ import annotations

import base64
import copy
import functools
import io
import json
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from srl_rlvr import model_types
from srl_rlvr.errors import InputError
from srl_rlvr.examples.files import Reading

_buffer = io.BytesIO()
Image.new("RGB", (8, 8)).save(_buffer, "PNG")
IMAGE = {"image": "data:image/png;base64," + base64.b64encode(_buffer.getvalue()).decode()}
ODD = (
    None,
    True,
    -1,
    1.5,
    float("nan"),
    10**400,
    "",
    "x",
    "a\0b",
    "\ud800",
    [],
    [None],
    [[]],
    ["a", "a"],
    {},
    {"": []},
)
SCHEMA = {"type": "object", "properties": {"total": {"type": "array", "items": {"type": "number"}}}}
FRAME = {"predicate": "sing", "index": 1, "args": [{"role": "ARG0", "start": 0, "end": 1}]}
SPANS = [{"type": "person", "start": 0, "text": "Ada"}]
CORPUS = {
    "corpus": [{"doc_id": "1", "text": "one", "title": "T"}, {"doc_id": "2", "text": "two"}],
    "queries_train": [{"query": "q", "positives": ["1"], "bm25_top": ["2", "1"]}],
    "queries_dev": [{"query": "q", "positives": {"1": 2}, "candidates": ["2", "1"]}],
}
INTENTS = [{"text": "hi", "label": "greet"}, {"text": "bye", "label": "leave"}]
ROUTER = {
    "train": INTENTS,
    "dev": INTENTS,
    "costs": [{"label": "greet", "picked": "leave", "cost": 2}],
    "labels": [{"label": "greet", "description": "says hello"}],
}
CHARACTERS = [IMAGE | {"alphabet": "a", "character": character} for character in "xxy"]


def whole(*rows: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {"train": list(rows), "dev": list(rows)}


@pytest.mark.parametrize(
    ("model_type", "files"),
    [
        ("task_llm", whole({"question": "1 + 1?", "answer": "2", "steps": ["1 + 1 = 2"]})),
        ("task_llm", whole({"question": "?", "options": ["A) 1", "B) 2"], "answer": "A", "rationale": "So A."})),
        ("task_llm", whole({"question": "?", "equation": "( 1 + 2 )", "answer": 3})),
        ("task_llm", whole({"premises": ["p"], "conclusion": "c", "label": "True"})),
        ("srl_parser", whole({"text": "Ada sings", "frames": [FRAME]})),
        ("srl_parser", whole({"tokens": ["Ada", "sings"], "frames": [FRAME]})),
        ("extractor", whole({"text": "Total 5", "target": {"total": [5]}, "schema": SCHEMA, "domain": "shop"})),
        ("extractor", whole({"text": "Ada sings", "entities": SPANS})),
        ("extractor", whole({"tokens": ["Ada", "sings"], "slots": SPANS})),
        ("intent_router", ROUTER),
        ("embeddings", CORPUS),
        ("reranker", whole({"query": "q", "candidates": ["a", "b"], "labels": [1, 0]})),
        ("multimodal_vision", whole(IMAGE | {"question": "?", "answer": "a", "steps": ["s"]})),
        ("multimodal_vision", whole({"images": [IMAGE["image"]], "question": "?", "answer": 1.5})),
        ("multimodal_vision", whole(IMAGE | {"label": "cat"})),
        ("multimodal_vision", whole(IMAGE | {"n_cells": 1})),
        ("multimodal_vision", whole(IMAGE | {"sentence": "s", "label": True, "structured_rep": "[]"})),
        ("multimodal_vision", whole(*CHARACTERS)),
    ],
)
def test_a_row_is_read_or_refused(tmp_path: Path, model_type: str, files: dict[str, list[Any]]) -> None:
    def load(changed: dict[str, list[Any]]) -> None:
        for name, rows in changed.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for split in ("train", "dev"):
            model_types.find(model_type).load(tmp_path, split, Reading())

    load(files)
    refused = 0
    for name, rows in files.items():
        for place in places(rows[0]):
            for value in ODD:
                try:
                    load(files | {name: [put(rows[0], place, value), *rows[1:]]})
                except InputError as error:
                    refused += 1
                    assert "\n" not in str(error) and ".jsonl" in str(error)
    assert refused


@pytest.mark.parametrize(
    ("model_type", "files", "name", "place"),
    [
        ("task_llm", whole({"question": "?", "answer": 1}), "train", ("question",)),
        ("task_llm", whole({"premises": ["p"], "conclusion": "c", "label": "True"}), "train", ("premises", 0)),
        ("srl_parser", whole({"text": "Ada sings", "frames": [FRAME]}), "train", ("text",)),
        ("extractor", whole({"text": "Ada sings", "entities": SPANS}), "train", ("text",)),
        ("intent_router", ROUTER, "train", ("text",)),
        ("embeddings", CORPUS, "corpus", ("text",)),
        ("embeddings", CORPUS, "queries_train", ("query",)),
        ("reranker", whole({"query": "q", "candidates": ["a", "b"], "labels": [1, 0]}), "train", ("candidates", 1)),
        ("multimodal_vision", whole(IMAGE | {"question": "?", "answer": "a"}), "train", ("question",)),
    ],
)
def test_a_text_of_100_000_characters_is_refused(
    tmp_path: Path, model_type: str, files: dict[str, list[Any]], name: str, place: tuple[Any, ...]
) -> None:
    last = files[name][-1]
    value = functools.reduce(operator.getitem, place, last)

    def load(length: int, reading: Reading) -> int:
        changed = files | {name: [*files[name], put(last, place, value.ljust(length))]}
        if name == "corpus":
            changed["corpus"][-1]["doc_id"] = "3"
        for of, rows in changed.items():
            (tmp_path / f"{of}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return model_types.find(model_type).load(tmp_path, "train", reading).num_rows

    assert load(99_000, Reading())
    refused = rf"{name}\.jsonl, row {len(files[name]) + 1}: .* has 100,\d{{3}} characters; it should have fewer"
    with pytest.raises(InputError, match=refused):
        load(100_000, Reading())
    assert load(100_000, Reading(skip_bad=True))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value stands, and each value in it."""
    if at:
        yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


def put(row: Any, place: tuple[Any, ...], value: Any) -> Any:
    changed = inner = copy.deepcopy(row)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed
