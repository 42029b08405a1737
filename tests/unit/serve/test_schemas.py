"""Which JSON Schemas a request may bring."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from serve import schemas
from serve.errors import Refusal
from serve.sandbox import Sandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox(1)
    yield made
    made.close()


def of(field: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": field}} | more


def doubled(keyword: str, times: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {str(n): {keyword: [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(times)}
    return of({"$ref": "#/$defs/0"}, **{"$defs": definitions | {str(times): {"type": "string"}}})


def chained(length: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(length)}
    return of({"$ref": "#/$defs/0"}, **{"$defs": definitions | {str(length): {"type": "string"}}})


def objects_doubled(times: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {
        str(n): {"properties": {"a": {"$ref": f"#/$defs/{n + 1}"}, "b": {"$ref": f"#/$defs/{n + 1}"}}}
        for n in range(times)
    }
    return of({"$ref": "#/$defs/0"}, **{"$defs": definitions | {str(times): {"type": "string"}}})


RING = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
BAD = {
    "oneOf doubled": (doubled("oneOf", 25), "with its references ($ref) followed"),
    "anyOf doubled": (doubled("anyOf", 25), "with its references ($ref) followed"),
    "allOf doubled 60 times": (doubled("allOf", 30), "with its references ($ref) followed"),
    "objects doubled": (objects_doubled(25), "with its references ($ref) followed"),
    "a chain": (chained(400), "hold for one value"),
    "itself": ({"type": "object", "$ref": "#"}, "refers to itself"),
    "itself in allOf": ({"type": "object", "allOf": [{"$ref": "#"}]}, "refers to itself"),
    "itself in if": ({"type": "object", "if": {"$ref": "#"}, "then": True}, "refers to itself"),
    "itself in dependentSchemas": ({"type": "object", "dependentSchemas": {"a": {"$ref": "#"}}}, "refers to itself"),
    "itself, dynamically": ({"$dynamicAnchor": "n", "not": {"$dynamicRef": "#n"}}, "refers to itself"),
    "a ring": (of({"$ref": "#/$defs/a"}, **{"$defs": RING}), "refers to itself"),
    "a bound of 4,000 digits": (of({"type": "integer", "minimum": 10**4000}), "64 bits"),
    "a length of 2^63": (of({"type": "string", "minLength": 2**63}), "64 bits"),
    "nested groups": (of({"type": "string", "pattern": "(" * 100 + ")" * 100}), "groups in each other"),
    "20,000 nested groups": (of({"type": "string", "pattern": "(" * 20_000 + ")" * 20_000}), "are the most"),
    "a long pattern": (of({"type": "string", "pattern": "a|" * 600}), "pattern of 1,200 characters"),
    "a pattern that repeats": (of({"type": "string", "pattern": "^a{0,9999}$"}), "repeats a part 9,999 times"),
    "a pattern that repeats without end": (of({"type": "string", "pattern": "a{5000,}"}), "repeats a part 5,000 times"),
    "a repeat of many digits": (of({"type": "string", "pattern": f"a{{{'9' * 900}}}"}), "repeats a part"),
    "many repeats": (of({"type": "string", "pattern": "^" + "a{0,999}" * 99 + "$"}), "in all"),
    "many patterns": (of({"anyOf": [{"pattern": "a" * 900}] * 30}), "in its patterns"),
    "a pattern in propertyNames": (of({"propertyNames": {"pattern": "a|" * 600}}), "pattern of 1,200 characters"),
    "a large enum": (of({"enum": [f"{n}" + "v" * 500 for n in range(900)]}), "in its names and texts"),
    "a large const": (of({"const": "v" * 200_000}), "in its names and texts"),
    "large names": ({"type": "object", "properties": {"v" * 200_000: {}}}, "in its names and texts"),
    "many values": (of({"enum": list(range(3000))}), "more than 2,000 values"),
    "many levels": (functools.reduce(lambda inner, _: {"not": inner}, range(700), {}), "nested too deeply"),
    "no schema": (of({"type": "nothing"}), "no JSON Schema"),
    "elsewhere": (of({"$ref": "http://127.0.0.1/schema.json"}), "which is not in it"),
    "another base": (of({"$id": "x", "$ref": "#/$defs/a"}, **{"$defs": {"a": {}}}), "'$id' below its top"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_costs_too_much_is_refused_at_once_with_one_sentence(sandbox: Sandbox, name: str) -> None:
    schema, said = BAD[name]
    began = time.monotonic()
    with pytest.raises(Refusal) as found:
        asyncio.run(schemas.check(schema, sandbox))
    assert found.value.status == 400 and found.value.param == "schema"
    assert said in found.value.message and len(found.value.message) < 400 and "\n" not in found.value.message
    assert time.monotonic() - began < 5


GOOD = {
    "a tree": of({"$ref": "#/$defs/node"}, **{
        "$defs": {"node": of({"type": "array", "items": {"$ref": "#/$defs/node"}})},
    }),
    "itself in a field": of({"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
    "a definition that is used often": of({}, **{
        "$defs": {"text": {"type": "string", "maxLength": 9}},
        "properties": {str(n): {"$ref": "#/$defs/text"} for n in range(300)},
    }),
    "oneOf doubled six times": doubled("oneOf", 6),
    "names of keywords as fields": {"type": "object", "properties": {
        "$ref": {"type": "string"}, "pattern": {"type": "string"}, "$id": {"type": "string"}, "enum": {"type": "null"}
    }},
    "a base of its own": of({"$ref": "#/$defs/a"}, **{"$id": "https://example.com/a", "$defs": {"a": {}}}),
    "an ordinary pattern": of({"type": "string", "pattern": r"^(\(\d{3}\))? ?\d{3}-\d{4}$"}),
    "patterns that repeat": of({"type": "string", "pattern": r"^[a-z]{1,64}@([a-z]{1,63}\.){1,8}[a-z]{2,}$"}),
    "large numbers": of({"type": "number", "minimum": -1e300, "maximum": 2**62}),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_people_write_is_taken(sandbox: Sandbox, name: str) -> None:
    asyncio.run(schemas.check(GOOD[name], sandbox))


def test_a_schema_may_refer_to_itself_and_be_as_deep_as_its_check_can_go(sandbox: Sandbox) -> None:
    deepest: Any = functools.reduce(lambda inner, _: {"not": inner}, range(60), {"$ref": "#/$defs/a"})
    schema = deepest | {"$defs": {"a": {"$ref": "#a"}, "b": {"$anchor": "a"}}, "properties": {"$ref": True}}
    asyncio.run(schemas.check(schema, sandbox))


def test_a_schema_that_was_good_is_not_checked_again(sandbox: Sandbox) -> None:
    schema = of({"type": "string", "title": "once"})
    asyncio.run(schemas.check(schema, sandbox))
    asyncio.run(schemas.check(dict(schema), None))  # type: ignore[arg-type]


def test_the_schema_of_response_format_is_checked(sandbox: Sandbox) -> None:
    for given in (None, {"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}):
        asyncio.run(schemas.check_response_format(given, sandbox))
    with pytest.raises(Refusal, match="refers to itself"):
        given = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}
        asyncio.run(schemas.check_response_format(given, sandbox))
