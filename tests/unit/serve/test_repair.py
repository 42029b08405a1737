"""What a replica makes of an answer that should be JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve.answers import repaired
from serve.errors import Refusal
from serve.replicas import _ONLY_VLLM, _asks

SCHEMA = {"type": "object", "properties": {"total": {"type": "number"}}}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"total": 4.50}', ('{"total": 4.50}', False)),
        ('Here: {"total": 4.5', ('{"total": 4.5}', True)),
        ('<think>{"total": 1}</think>{"total": 2}', ('{"total": 2}', False)),
    ],
)
def test_an_answer_is_the_json_that_it_has(text: str, found: tuple[str, bool]) -> None:
    assert repaired(text, SCHEMA) == found


@pytest.mark.parametrize("text", ['{"total": NaN}', '{"total": 1e999}', "[" * 100_000, "none", '{"total": "x"}'])
def test_an_answer_of_which_no_json_can_be_made_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="answer"):
        repaired(text, SCHEMA)


def test_a_pattern_that_takes_for_ever_does_not_match() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}}}
    with pytest.raises(Refusal, match="does not match"):
        repaired('{"a": "' + "a" * 60 + '"}', schema)
    assert repaired('{"a": "abBc"}', schema) == ('{"a": "abBc"}', False)


def test_a_schema_is_never_read_from_elsewhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "secret.json"
    elsewhere.write_text('{"const": "secret"}')
    for reference in (elsewhere.as_uri(), "#/nowhere"):
        with pytest.raises(Refusal) as found:
            repaired('{"total": 1}', {"$ref": reference})
        assert found.value.status == 400 and found.value.param == "schema" and "secret'" not in found.value.message


@pytest.mark.parametrize(
    ("name", "nothing", "something"),
    [
        ("top_p", [1, 1.0], [0.5, True]),
        ("logprobs", [False], [True, 0, 1]),
        ("frequency_penalty", [0, 0.0], [1, False]),
        ("presence_penalty", [0, 0.0], [1.0, -1]),
        ("stop", ["", []], ["a", ["a"]]),
        ("top_k", [0, -1], [1]),
        ("repetition_penalty", [1, 1.0], [1.1]),
        ("logit_bias", [{}], [{"1": 1}]),
    ],
)
def test_what_our_own_engine_cannot_do_is_known_by_its_value(
    name: str, nothing: list[Any], something: list[Any]
) -> None:
    neutral = _ONLY_VLLM[name]
    assert not any(_asks(value, neutral) for value in (None, *nothing))
    assert all(_asks(value, neutral) for value in something)
