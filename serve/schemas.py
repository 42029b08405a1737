"""Which JSON Schemas a request may bring. Bounds keep small ones from costing much later: in the checks here, in the
grammar that an engine holds its answer to, in the answer's validation.

Sizes are counted in the caller's event loop; what follows references and keywords runs in the sandbox.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from srl_rlvr.verifiers import structures

if TYPE_CHECKING:
    from serve.sandbox import Sandbox

VALUES = 2_000  # objects, texts and numbers, as the schema is written
EXPANDED = 20_000  # with each reference replaced by the schema to which it points
IN_PLACE = 64  # schemas that hold for the same part of an answer, one through the other
TEXT = 100_000  # characters of all names and texts together
PATTERN = 1_000  # characters of one
PATTERNS = 20_000  # of all together
GROUPS = 32  # of a pattern, one in the other
REPEATS = 1_000  # of `{n,m}` in a pattern: a grammar takes the square of the time for it
ALL_REPEATS = 5_000  # of all together
INTEGER = 2**63
_CHECK_S, _PROCESSOR_S = 20.0, 5.0
_REMEMBERED = 256  # schemas that were found to be good
_ALTERNATIVES = ("allOf", "anyOf", "oneOf")
_OTHERS_IN_PLACE = ("not", "if", "then", "else")
_REPEAT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")
_GROUP = re.compile(r"\\.|[()]", re.DOTALL)

_good: OrderedDict[bytes, None] = OrderedDict()


async def check_response_format(given: Any, sandbox: Sandbox) -> None:
    """Check the schema of OpenAI's `response_format`, if it has one. Raises Refusal as `check` does."""
    match given:
        case {"json_schema": {"schema": dict(schema)}}:
            await check(schema, sandbox)


async def check(schema: dict[str, Any], sandbox: Sandbox) -> None:
    """Raises Refusal (400) for what is no JSON Schema, is above a bound, or refers to something that is not in it."""
    from serve.errors import Refusal
    from serve.sandbox import SandboxError

    try:
        check_sizes(schema)
        key = hashlib.sha256(json.dumps(schema).encode()).digest()
        if key not in _good:
            await sandbox.run("serve.schemas:check_meaning", schema, deadline_s=_CHECK_S, processor_s=_PROCESSOR_S)
    except ValueError as error:
        raise Refusal(400, f"schema {error}", param="schema") from None
    except (TimeoutError, SandboxError):
        raise Refusal(400, "schema is too complex to check: make it smaller", param="schema") from None
    _good[key] = None
    _good.move_to_end(key)
    while len(_good) > _REMEMBERED:
        _good.popitem(last=False)


def check_sizes(schema: dict[str, Any]) -> None:
    """Raises ValueError, with a clause that stands after "schema"."""
    texts, patterns, repeats = 0, 0, 0
    for value in _values(schema):
        match value:
            case str():
                texts += len(value)
            case int() if abs(value) >= INTEGER:
                raise ValueError("has a number that does not fit into 64 bits")
            case dict():
                texts += sum(map(len, value))
                _check_object(value, value is schema)
                if isinstance(pattern := value.get("pattern"), str):
                    patterns += len(pattern)
                    repeats += _check_pattern(pattern)
    if texts > TEXT:
        raise ValueError(f"has {texts:,} characters in its names and texts; {TEXT:,} are the most")
    if repeats > ALL_REPEATS:
        raise ValueError(f"repeats parts of its patterns up to {repeats:,} times in all; {ALL_REPEATS:,} are the most")
    if patterns > PATTERNS:
        raise ValueError(f"has {patterns:,} characters in its patterns; {PATTERNS:,} are the most")


def _values(schema: Any) -> list[Any]:
    """All of them, level by level. Raises ValueError for too many of either."""
    found: list[Any] = []
    level = [schema]
    for _ in range(structures.DEEPEST):
        found += level
        if len(found) > VALUES:
            raise ValueError(f"holds more than {VALUES:,} values")
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return found
    raise ValueError(f"is nested too deeply: {structures.DEEPEST} levels are the most")


def _inside(value: Any) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_object(value: Mapping[str, Any], is_root: bool) -> None:
    if "patternProperties" in value:
        raise ValueError("has 'patternProperties', which is not supported here")
    if isinstance(value.get("$id"), str) and not is_root:
        raise ValueError("has '$id' below its top, which is not supported here")


def _check_pattern(pattern: str) -> int:
    """Return how often it repeats its parts, all together."""
    if len(pattern) > PATTERN:
        raise ValueError(f"has a pattern of {len(pattern):,} characters; {PATTERN:,} are the most")
    depth = deepest = 0
    for found in _GROUP.finditer(pattern):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    if deepest > GROUPS:
        raise ValueError(f"has a pattern with {deepest} groups in each other; {GROUPS} are the most")
    counts = [count for found in _REPEAT.finditer(pattern) for count in found.groups() if count]
    most = max((int(count) if len(count) < 20 else INTEGER for count in counts), default=0)
    if most > REPEATS:
        raise ValueError(f"has a pattern that repeats a part {most:,} times or more; {REPEATS:,} are the most")
    return sum(map(int, counts))


def check_meaning(schema: dict[str, Any]) -> None:
    """Raises ValueError, with a clause that stands after "schema". In the sandbox."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except (SchemaError, RecursionError) as error:
        said = error.message[:200] if isinstance(error, SchemaError) else "it is nested too deeply"
        raise ValueError(f"is no JSON Schema: {said}") from None
    targets = _targets(schema)
    _check_in_place(schema, targets)
    if _expanded(schema, targets) > EXPANDED:
        raise ValueError(f"is too large: with its references ($ref) followed it holds more than {EXPANDED:,} values")


def _targets(schema: dict[str, Any]) -> dict[str, Any]:
    """What each reference points to."""
    resolver = structures.resolver(schema)
    found: dict[str, Any] = {}
    for value in structures.everything_in(schema):
        for name in _references(value):
            if name not in found:
                found[name] = structures.referred(name, resolver)
                if found[name] is None:
                    raise ValueError(f"refers to '{name[:100]}', which is not in it")
    return found


def _references(value: Any) -> list[str]:
    named = (value.get(keyword) for keyword in ("$ref", "$dynamicRef")) if isinstance(value, dict) else ()
    return [name for name in named if isinstance(name, str)]


def _check_in_place(schema: dict[str, Any], targets: Mapping[str, Any]) -> None:
    """Nothing may hold for the same part of an answer through itself, or through very many others."""
    of = {id(value): value for value in structures.everything_in(schema) if isinstance(value, dict)}
    edges = {key: [id(inner) for inner in _in_place(value, targets)] for key, value in of.items()}
    try:
        order = list(TopologicalSorter(edges).static_order())
    except CycleError:
        raise ValueError("refers to itself before any part of the answer is read") from None
    length: dict[int, int] = {}
    for key in order:
        length[key] = 1 + max((length[inner] for inner in edges.get(key, ())), default=0)
    if max(length.values()) > IN_PLACE:
        raise ValueError(f"has more than {IN_PLACE} schemas that hold for one value, each within another")


def _in_place(value: dict[str, Any], targets: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas that hold for what this one holds for."""
    found: list[Any] = [targets[name] for name in _references(value)]
    for keyword in _ALTERNATIVES:
        found += _inside(value.get(keyword))
    found += [value.get(keyword) for keyword in _OTHERS_IN_PLACE]
    found += _inside(value.get("dependentSchemas"))
    return (inner for inner in found if isinstance(inner, dict))


def _expanded(schema: dict[str, Any], targets: Mapping[str, Any]) -> int:
    """How many values it holds with each reference followed, but not into what it is in."""
    sizes: dict[int, int] = {}  # 0: of what is being counted
    waiting: list[tuple[Any, bool]] = [(schema, False)]
    while waiting:
        value, counted = waiting.pop()
        inner = [*_inside(value), *(targets[name] for name in _references(value))]
        if counted:
            sizes[id(value)] = 1 + sum(sizes[id(each)] if isinstance(each, dict | list) else 1 for each in inner)
        elif id(value) not in sizes:
            sizes[id(value)] = 0
            waiting.append((value, True))
            waiting += [(each, False) for each in inner if isinstance(each, dict | list)]
    return sizes[id(schema)]
