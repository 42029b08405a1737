"""Structured answers: valid JSON times F1, by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from srl_rlvr.verifiers.structures import fields, frames

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


def test_nothing_where_nothing_was_wanted_is_right() -> None:
    assert fields("{}", "{}", SCHEMA).reward == 1.0


@pytest.mark.parametrize("text", ['{"total": "4.5"}', '{"other": 1}', "[]", "4.5", '{"total": 4.5'])
def test_what_breaks_the_schema_is_invalid(text: str) -> None:
    score = fields(text, RECEIPT, SCHEMA)
    assert (score.outcome, score.reward, score.components["field_wanted"]) == ("invalid", 0.0, 4)


def test_f1_over_many_answers_counts_parts_and_not_answers() -> None:
    from srl_rlvr import model_types

    scores: list[Any] = [fields('{"total": 4.5}', RECEIPT, SCHEMA), fields("{", RECEIPT, SCHEMA)]
    found = model_types.find("extractor").metrics([{"components": json.dumps(dict(s.components))} for s in scores], {})
    assert found == {"valid": 0.5, "exact": 0.0, "field_f1": pytest.approx(2 * 1 / (1 + 8))}
