"""Structured answers: valid JSON times F1, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srl_rlvr.verifiers.structures import fields, frames, read_json

SENTENCE = {"text": "She likes to sing and he likes jazz"}
GOLD = json.dumps(
    [
        {"predicate": "likes", "ARG0": "She", "ARG1": "to sing"},
        {"predicate": "likes", "ARG0": "he", "ARG1": "jazz"},
    ]
)
SCHEMA = {
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "total": {"type": "number"},
            "date": {"type": "string", "format": "date"},
            "who": {"type": "array", "items": {"type": "string"}},
        },
    }
}
RECEIPT = '{"total": 4.5, "date": "2024-05-03", "who": ["Ada", "Bob"]}'


def test_a_role_counts_only_with_its_frame_its_name_and_its_whole_span() -> None:
    found = [{"predicate": "likes", "ARG0": "She", "ARG1": "to"}, {"predicate": "likes", "ARG0": "he", "ARG2": "jazz"}]
    score = frames(json.dumps(found), GOLD, SENTENCE)
    assert score.components["role_right"] == 2 and score.components["predicate_right"] == 2
    assert score.reward == pytest.approx((1 + 2 * 2 / (4 + 4)) / 2) and score.components["exact"] == 0


def test_leaving_out_roles_costs_half_however_many_predicates_are_right() -> None:
    """F1 over both together would pay 2 / 3 for predicates alone."""
    assert frames('[{"predicate": "likes"}, {"predicate": "likes"}]', GOLD, SENTENCE).reward == 0.5


def test_roles_that_are_neither_there_nor_wanted_do_not_count() -> None:
    bare = '[{"predicate": "likes"}]'
    assert frames(bare, '[{"predicate": "likes"}, {"predicate": "sing"}]', SENTENCE).reward == pytest.approx(2 / 3)
    assert frames('[{"predicate": "likes", "ARG0": "She"}]', bare, SENTENCE).reward == 0.5


def test_frames_of_one_predicate_are_told_apart_by_their_order() -> None:
    swapped = json.dumps(json.loads(GOLD)[::-1])
    assert frames(swapped, GOLD, SENTENCE).components["role_right"] == 0


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[{", "not JSON"),
        ('{"predicate": "likes"}', "not a JSON array"),
        ('[{"ARG0": "She"}]', "a frame without a predicate"),
        ('[{"predicate": "likes", "ARG0": "Tom"}]', "a span that is not in the text: Tom"),
        ('[{"predicate": "likes", "ARG0": 7}]', "a span that is not in the text: 7"),
        ("[" * 100_000, "JSON"),
        ('[{"predicate": "likes", "ARG0": "She", "ARG0": "he"}]', "a name that comes twice"),
    ],
)
def test_frames_that_are_wrong_in_form_earn_the_stages_penalty(text: str, fault: str) -> None:
    score = frames(text, GOLD, SENTENCE | {"invalid_reward": -0.5})
    assert (score.outcome, score.reward) == ("invalid", -0.5) and fault in score.detail
    assert score.components["role_wanted"] == 4 and score.components["role_given"] == 0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (RECEIPT, 1.0),
        ('{"total": 4.50, "date": "2024 5 3", "who": [" ada", "BOB"]}', 1.0),
        ('{"total": 4.5, "who": ["Ada"]}', 2 * 2 / (2 + 4)),
        ('{"who": ["Ada", "Ada"]}', 2 * 1 / (2 + 4)),
        ('{"total": ' + "9" * 400 + "}", 0.0),
        ("{}", 0.0),
    ],
)
def test_fields_are_compared_by_their_type(text: str, reward: float) -> None:
    assert fields(text, RECEIPT, SCHEMA).reward == pytest.approx(reward)


def test_a_number_that_may_be_null_is_still_compared_by_value() -> None:
    schema = {"schema": {"properties": {"total": {"type": ["number", "null"]}}}}
    rewards = [fields(f'{{"total": {text}}}', '{"total": 5}', schema).reward for text in ("5.0", "null", "6")]
    assert rewards == [1, 0, 0] and fields('{"total": null}', '{"total": null}', schema).reward == 1


ITEM = {"type": "object", "properties": {"q": {"type": "number"}, "due": {"type": "string", "format": "date"}}}
DATE = {"type": "string", "format": "date"}
OR_NULL = {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "found", "wanted", "same"),
    [
        ({"anyOf": [{"type": "number"}, OR_NULL]}, 5, 5.0, True),
        ({"anyOf": [{"type": "number"}, OR_NULL]}, None, None, True),
        ({"anyOf": [{"type": "number"}, OR_NULL]}, None, 0, False),
        ({"enum": [5]}, 5, 5.0, True),
        (True, True, 1, False),
        (True, [True], [1], False),
        (True, True, "true", False),
        (True, "5", 5, False),
        ({"type": "string"}, "5", "5.0", False),
        (True, {"a": 1, "b": " X"}, {"b": "x", "a": 1.0}, True),
        (True, {"a": [1, 2]}, {"a": [2, 1]}, False),
        ({"type": "array", "items": ITEM}, [{"q": 2}], [{"q": 2.0}], True),
        ({"$ref": "#/$defs/item"}, {"due": "2024-01-02"}, {"due": "2024-1-2"}, True),
        ({"type": "array", "items": {"$ref": "#/$defs/item"}}, [{"due": "2024-01-02"}], [{"due": "2024-1-2"}], True),
        ({"anyOf": [DATE, OR_NULL]}, "2024-01-02", "2024-1-2", True),
        ({"anyOf": [{"type": "array", "items": DATE}, OR_NULL]}, ["2024-01-02"], ["2024/1/2"], True),
        (DATE, "March 5, 2024", "May 5, 2024", False),
        (DATE, "tomorrow", "unknown", False),
        (DATE, "3  May", "3 may", True),
        (DATE, "1" * 5000, "2" * 5000, False),
    ],
)
def test_values_are_compared_by_what_they_are(schema: Any, found: Any, wanted: Any, same: bool) -> None:
    whole = {"schema": {"properties": {"p": schema}, "$defs": {"item": ITEM}}}
    one, other = (json.dumps({"p": value}) for value in (found, wanted))
    assert fields(one, other, whole).reward == fields(other, one, whole).reward == float(same)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"p": NaN}', "a number that is not finite"),
        ('{"p": -Infinity}', "a number that is not finite"),
        ('{"p": 1e400}', "a number that is not finite"),
        ('{"p": ' + "9" * 400 + "}", "a number that is not finite"),
        ('{"p": ' + "9" * 5000 + "}", "a number that is not finite"),
        ('{"p": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\ud800": 1}', "half of a surrogate pair"),
        ('{"p": 7, "p": 1}', "a name that comes twice"),
        ('{"p": {"q": 7, "q": 1}}', "a name that comes twice"),
        ('{"p": ' + "[" * 100 + "]" * 100 + "}", "nested too deeply"),
        ('{"p": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_readers_take_differently_is_invalid(text: str, fault: str) -> None:
    score = fields(text, '{"p": 1}', {"schema": {"properties": {"p": {"multipleOf": 0.5}}}})
    assert score.outcome == "invalid" and fault in score.detail
    with pytest.raises(ValueError, match=fault):
        read_json(text)


def test_json_is_what_stands_outside_the_thoughts() -> None:
    text = '<think>{"total": 1}, or</think>{"total": 4.5,\n<think>two</think>"who": ["Ada", "Bob"]}'
    assert fields(text, '{"total": 4.5, "who": ["Ada", "Bob"]}', SCHEMA).reward == 1
    assert frames(f"<think>two of them</think>{GOLD}", GOLD, SENTENCE).reward == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('<think>a</think>{"p": 1}', {"p": 1}),
        ("[" * 1000, None),
        ('{"p": NaN}', None),
        ('{"p": "\\ud800"}', None),
        ("none", None),
    ],
)
def test_what_is_shown_is_the_json_or_null(text: str, answer: Any) -> None:
    from srl_rlvr import model_types

    found = model_types.find("extractor").present({}, {"text": text}, {})
    assert found == answer and json.dumps(found, ensure_ascii=False, allow_nan=False).encode()


def test_nothing_where_nothing_was_wanted_is_right() -> None:
    assert fields("{}", "{}", SCHEMA).reward == 1.0


@pytest.mark.parametrize("text", ['{"total": "4.5"}', '{"other": 1}', "[]", "4.5", '{"total": 4.5'])
def test_what_breaks_the_schema_is_invalid(text: str) -> None:
    score = fields(text, RECEIPT, SCHEMA)
    assert (score.outcome, score.reward, score.components["field_wanted"]) == ("invalid", 0.0, 4)


def test_f1_over_many_answers_counts_parts_and_not_answers() -> None:
    from srl_rlvr import model_types

    scores: list[Any] = [fields('{"total": 4.5}', RECEIPT, SCHEMA), fields("{", RECEIPT, SCHEMA)]
    predictions = [{"components": json.dumps(dict(s.components))} for s in scores]
    found = model_types.find("extractor").metrics(predictions, {})
    assert found == {"valid": 0.5, "exact": 0.0, "field_f1": pytest.approx(2 * 1 / (1 + 8))}


def test_a_schema_is_never_read_from_elsewhere(tmp_path: Path) -> None:
    from referencing.exceptions import Unresolvable

    elsewhere = tmp_path / "schema.json"
    elsewhere.write_text("true")
    with pytest.raises(Unresolvable):
        fields("{}", "{}", {"schema": {"$ref": elsewhere.as_uri()}})
