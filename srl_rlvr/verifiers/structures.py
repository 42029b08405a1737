"""What a structured answer is worth: JSON that is valid, times F1 over its parts, kind by kind.

A part counts as found once, where the expert has it once. JSON that does not parse, that readers take differently, or
that breaks its schema is `invalid`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from srl_rlvr.verifiers.answers import without_thoughts
from srl_rlvr.verifiers.base import INVALID, SCORED, Score

Part = tuple[Any, ...]

_DATE = re.compile(r"\D*(\d{1,9})\D+(\d{1,9})\D+(\d{1,9})\D*")
_PATTERN_S = 0.2
DEEPEST = 64  # a bound, so that neither the schema's check nor the comparison runs out of stack


def fields(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """F1 over fields and items of arrays; numbers are compared by value, dates by their digits, texts without regard
    to case and white space, objects without regard to order. `schema` in the metadata is the JSON Schema."""
    found, fault = _parsed(text, dict)
    if fault:
        return _invalid(metadata, fault, reference, "field")
    schema = metadata["schema"]
    error = next(validator(schema).iter_errors(found), None)
    if error is not None:
        return _invalid(metadata, f"not valid by the schema: {error.message[:120]}", reference, "field")
    parts = [Counter(_field_parts(of, schema)) for of in (found, json.loads(reference))]
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


def validator(schema: Mapping[str, Any]) -> Any:
    """Of a JSON Schema, with what it refers to in itself only: nothing is read from elsewhere."""
    from referencing import Registry

    return _validators()(schema, registry=Registry())


@functools.cache
def _validators() -> Any:
    """JSON Schema's, but that a `pattern` which takes long does not match: it may be anyone's, and Python's own `re`
    can take for ever."""
    import regex
    from jsonschema import Draft202012Validator, ValidationError
    from jsonschema.validators import extend

    def pattern(_: Any, of: str, value: Any, __: Any) -> Iterator[ValidationError]:
        try:
            fits = not isinstance(value, str) or regex.search(of, value, timeout=_PATTERN_S)
        except (TimeoutError, regex.error):
            fits = False
        if not fits:
            yield ValidationError(f"{value!r} does not match {of!r}")

    return extend(Draft202012Validator, {"pattern": pattern})


def read_json(text: str) -> Any:
    """The value, where all readers of JSON take it for the same. Raises ValueError saying what it is not: numbers are
    finite, names come once, and texts can be written as UTF-8."""
    try:
        found = json.loads(
            text, object_pairs_hook=_object, parse_int=_number, parse_float=_number, parse_constant=_number
        )
        json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise ValueError("not JSON") from None
    except UnicodeEncodeError:
        raise ValueError("JSON with half of a surrogate pair") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    everything_in(found)
    return found


def everything_in(value: Any) -> list[Any]:
    """It and all that it holds, level by level. Raises ValueError where these are more than 64."""
    found: list[Any] = []
    level = [value]
    for _ in range(DEEPEST):
        found += level
        level = [each for of in level for each in _children(of)]
    if level:
        raise ValueError("JSON that is nested too deeply")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("JSON with a name that comes twice in one object")
    return found


def _number(text: str) -> int | float:
    if not math.isfinite(float(text)):
        raise ValueError("JSON with a number that is not finite")
    return int(text) if text.removeprefix("-").isdigit() else float(text)


def _children(value: Any) -> Sequence[Any]:
    return [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()


def _parsed(text: str, kind: type) -> tuple[Any, str]:
    try:
        found = read_json(without_thoughts(text))
    except ValueError as error:
        return None, str(error)
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


def _field_parts(found: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Part]:
    properties = schema.get("properties", {})
    for name, value in found.items():
        normal = _normal(value, properties.get(name), schema)
        if isinstance(value, list):
            yield from ((name, item) for item in normal)
        else:
            yield name, normal


def _normal(value: Any, schema: Any, whole: Mapping[str, Any]) -> Any:
    """The same for values that count as the same, and hashable."""
    match value:
        case bool():  # Python takes True for 1
            return bool, value
        case str():
            is_date = any(of.get("format") == "date" for of in alternatives(schema, whole))
            if is_date and (date := _DATE.fullmatch(value)):
                return "-".join(str(int(digits)) for digits in date.groups())
            return " ".join(value.split()).casefold()
        case list():
            items = {"anyOf": [of["items"] for of in alternatives(schema, whole) if "items" in of]}
            return tuple(_normal(item, items, whole) for item in value)
        case dict():
            fields_ = [of.get("properties", {}) for of in alternatives(schema, whole)]
            of_name = {name: {"anyOf": [of[name] for of in fields_ if name in of]} for name in value}
            return frozenset((name, _normal(item, of_name[name], whole)) for name, item in value.items())
    return value


def alternatives(schema: Any, whole: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemas that a value may have: this one, or those that it names by `anyOf`, `oneOf` or a reference within
    the `whole`. True, false and what a reference does not find are schemas that say nothing."""
    found: list[Mapping[str, Any]] = []
    met: list[Any] = []
    todo = [schema]
    while todo:
        of = todo.pop(0)
        if any(of is one for one in met):  # a reference to itself
            continue
        met.append(of)
        named = _named(of, whole) if isinstance(of, Mapping) else []
        todo[:0] = named
        if not named:
            found.append(of if isinstance(of, Mapping) else {})
    return found or [{}]


def _named(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Sequence[Any]:
    if "$ref" in schema:
        return [referred(schema["$ref"], resolver(whole))]
    if schema.keys() & {"type", "properties", "enum"}:
        return []
    return schema.get("anyOf") or schema.get("oneOf") or []


def resolver(schema: Mapping[str, Any]) -> Any:
    """Of what refers to a part of this schema, for `referred`."""
    from referencing import Registry
    from referencing.jsonschema import DRAFT202012

    return Registry().resolver_with_root(DRAFT202012.create_resource(schema))


def referred(reference: str, resolver: Any) -> Any:
    """The schema that stands there (`#/$defs/name`), None where there is none or it is elsewhere."""
    from referencing.exceptions import Unresolvable

    try:
        found = resolver.lookup(reference).contents if reference.startswith("#") else None
    except (Unresolvable, TypeError, ValueError):  # the last two: a pointer into a text or a number
        return None
    return found if isinstance(found, dict | bool) else None


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
