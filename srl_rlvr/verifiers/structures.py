"""What a structured answer is worth: JSON that is valid, times F1 over its parts, kind by kind.

A part counts as found once, where the expert has it once. JSON that does not parse, or breaks its schema, is `invalid`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from srl_rlvr.verifiers.base import INVALID, SCORED, Score

Part = tuple[Any, ...]


def fields(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """F1 over fields and items of arrays; numbers are compared by value, dates by their digits, texts without regard
    to case and white space. `schema` in the metadata is the JSON Schema."""
    found, fault = _parsed(text, dict)
    if fault:
        return _invalid(metadata, fault, reference, "field")
    from jsonschema import Draft202012Validator

    error = next(Draft202012Validator(metadata["schema"]).iter_errors(found), None)
    if error is not None:
        return _invalid(metadata, f"not valid by the schema: {error.message[:120]}", reference, "field")
    properties = metadata["schema"].get("properties", {})
    parts = [Counter(_field_parts(of, properties)) for of in (found, json.loads(reference))]
    return _scored({"field": (parts[0], parts[1])}, exact=parts[0] == parts[1])


def frames(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """The mean of F1 over predicates and F1 over roles. F1 over both together is highest without roles, as long as they
    are seldom right. A role counts where its frame, its name and its whole span are right (the measure of CoNLL-2005
    and 2012); `text` in the metadata is the sentence, in which every span has to stand."""
    found, fault = _parsed(text, list)
    if not fault:
        fault = next(filter(None, (_frame_fault(frame, metadata["text"]) for frame in found)), "")
    if fault:
        return _invalid(metadata, fault, reference, "predicate", "role")
    ours, theirs = _frame_parts(found), _frame_parts(json.loads(reference))
    return _scored({name: (ours[name], theirs[name]) for name in ours}, exact=ours == theirs)


def _parsed(text: str, kind: type) -> tuple[Any, str]:
    try:
        found = json.loads(text)
    except ValueError:
        return None, "not JSON"
    except RecursionError:
        return None, "JSON that is nested too deeply"
    return (found, "") if isinstance(found, kind) else (None, f"not a JSON {'object' if kind is dict else 'array'}")


def _frame_fault(frame: Any, sentence: str) -> str:
    if not isinstance(frame, dict) or not isinstance(frame.get("predicate"), str):
        return "a frame without a predicate"
    spans = [span for value in frame.values() for span in _spans(value)]
    spans = [span for span in spans if not isinstance(span, str) or span not in sentence]
    return f"a span that is not in the text: {str(spans[0])[:60]}" if spans else ""


def _spans(value: Any) -> list[Any]:
    """A role that a frame has more than once holds a list of its spans."""
    return value if isinstance(value, list) else [value]


def _frame_parts(frames_: list[dict[str, Any]]) -> dict[str, Counter[Part]]:
    """The frame of a predicate's n-th occurrence is told from others by n: frames stand in the order of the text."""
    times: Counter[str] = Counter()
    parts: dict[str, Counter[Part]] = {"predicate": Counter(), "role": Counter()}
    for frame in frames_:
        of = (frame["predicate"], times[frame["predicate"]])
        times[frame["predicate"]] += 1
        parts["predicate"][of] += 1
        roles = ((role, span) for role, value in frame.items() if role != "predicate" for span in _spans(value))
        parts["role"].update((*of, role, span) for role, span in roles)
    return parts


def _field_parts(found: Mapping[str, Any], properties: Mapping[str, Any]) -> Iterator[Part]:
    for name, value in found.items():
        kind = properties.get(name, {})
        if isinstance(value, list):
            yield from ((name, _normal(item, kind.get("items", {}))) for item in value)
        else:
            yield name, _normal(value, kind)


def _normal(value: Any, kind: Mapping[str, Any]) -> Any:
    types = kind.get("type", ())
    types = (types,) if isinstance(types, str) else types
    if value is None or (isinstance(value, int | float) and ("number" in types or "integer" in types)):
        return value
    if kind.get("format") == "date":
        return tuple(map(int, re.findall(r"\d+", str(value))))
    return " ".join(str(value).split()).casefold()


def _scored(parts: Mapping[str, tuple[Counter[Part], Counter[Part]]], exact: bool) -> Score:
    """The mean of F1 over each kind; one neither given nor wanted does not count. Counts are components, so that
    F1 over many answers can be had from them."""
    components: dict[str, float] = {"valid": 1.0, "exact": float(exact)}
    of_kinds: list[float] = []
    for name, (found, expected) in parts.items():
        counts = (found & expected).total(), found.total(), expected.total()
        components |= dict(zip((f"{name}_right", f"{name}_given", f"{name}_wanted"), map(float, counts), strict=True))
        right, given, wanted = counts
        if given + wanted:
            of_kinds.append(2 * right / (given + wanted))
    return Score(SCORED, sum(of_kinds) / len(of_kinds) if of_kinds else 1.0, components)


def _invalid(metadata: Mapping[str, Any], fault: str, reference: str, *names: str) -> Score:
    expected = json.loads(reference)
    if "field" in names:
        wanted = {"field": sum(len(value) if isinstance(value, list) else 1 for value in expected.values())}
    else:
        wanted = {name: parts.total() for name, parts in _frame_parts(expected).items()}
    components: dict[str, float] = {"valid": 0.0, "exact": 0.0}
    for name, count in wanted.items():
        components |= {f"{name}_right": 0.0, f"{name}_given": 0.0, f"{name}_wanted": float(count)}
    return Score(INVALID, float(metadata.get("invalid_reward", 0.0)), components, fault)
