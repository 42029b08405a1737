"""One short input of the data, for a model's card: what whoever tries the model is shown first. It holds no answer."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

_SHORT = 600  # characters of a text that is shown as it is
_LONGEST = 4000
_CANDIDATES = 4
_LARGEST_IMAGE = 64 * 2**10  # bytes


def example_input(examples: pa.Table) -> dict[str, Any]:
    """{prompt}, with `candidates`, `schema` or `image` (base64) if the type has them: the first example that is short,
    else the shortest. Empty if there is none."""
    lengths = [len(text) for text in examples["prompt"].to_pylist()]
    if not lengths or min(lengths) > _LONGEST:
        return {}
    number = next((n for n, length in enumerate(lengths) if length <= _SHORT), lengths.index(min(lengths)))
    [row] = examples.slice(number, 1).to_pylist()
    found: dict[str, Any] = {"prompt": row["prompt"]}
    schema = json.loads(row["metadata"]).get("schema")
    if schema and not row["images"] and row["prompt"].startswith("{"):  # a line with its fields, then the text
        found = {"prompt": row["prompt"].partition("\n")[2], "schema": schema}
    if row["candidates"] and row["verifier"] != "label":  # labels are in the card
        found["candidates"] = _some(row)
    if row["images"] and len(row["images"][0]) <= _LARGEST_IMAGE:
        found["image"] = base64.b64encode(row["images"][0]).decode()
    return readable(found)


def readable(given: Any) -> dict[str, Any]:
    """What of a card's example has the right form and size; a card may have been written by hand."""
    if not isinstance(given, Mapping):
        return {}
    found: dict[str, Any] = {}
    match given.get("prompt"):
        case str(text) if text.strip() and len(text) <= _LONGEST:
            found["prompt"] = text
        case _:
            return {}
    match given.get("candidates"):
        case [*texts] if texts and all(isinstance(text, str) and text.strip() for text in texts):
            found["candidates"] = [" ".join(text.split())[:_SHORT] for text in texts[:_CANDIDATES]]
    match given.get("schema"):
        case dict(schema) if len(json.dumps(schema)) <= _LONGEST:
            found["schema"] = schema
    match given.get("image"):
        case str(image) if len(image) <= 2 * _LARGEST_IMAGE:
            found["image"] = image
    return found


def _some(row: Mapping[str, Any]) -> list[str]:
    """A few candidates in their order, at least one of which answers."""
    candidates = row["candidates"]
    right = [int(number) for number in json.loads(row["reference"])][:1]
    wrong = [number for number in range(len(candidates)) if number not in right]
    return [candidates[number] for number in sorted([*right, *wrong[: _CANDIDATES - len(right)]])]
