from __future__ import annotations

import json
from typing import Any

import pytest

from srl_rlvr.errors import InputError
from srl_rlvr.verifiers.reasoning_gym_scorers import REFUSED, reasoning_gym

pytest.importorskip("reasoning_gym")
FAMILIES = (
    "gcd",
    "chain_sum",
    "simple_equations",
    "syllogism",
    "letter_counting",
    "prime_factorization",
    "word_sorting",
)
GARBAGE = ("xyzzy plugh", "()", "[[0]]", "{}", "no solution", "0 1 2 3 4 5 6 7 8 9")


def item(family: str) -> dict[str, Any]:
    """As it arrives: through JSON."""
    from reasoning_gym.factory import create_dataset

    return json.loads(json.dumps(create_dataset(family, size=1, seed=7)[0], default=str))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_right_answer_earns_one_and_garbage_nothing(family):
    metadata = {"dataset": family, "entry": item(family)}
    assert reasoning_gym(f"Answer: {metadata['entry']['answer']}", "", metadata).reward == 1.0
    for garbage in GARBAGE:
        assert reasoning_gym(f"Answer: {garbage}", "", metadata).reward == 0.0


def test_an_answer_that_the_scorer_raises_on_is_invalid():
    metadata = {"dataset": "prime_factorization", "entry": item("prime_factorization"), "invalid_reward": -0.5}
    score = reasoning_gym("Answer: some primes", "", metadata)
    assert (score.outcome, score.reward) == ("invalid", -0.5)
    assert "ValueError" in score.detail


@pytest.mark.parametrize("text", ["", "no idea", "<think>Answer: 5"])
def test_no_answer_is_invalid(text):
    assert reasoning_gym(text, "", {"dataset": "gcd", "entry": item("gcd")}).outcome == "invalid"


def test_part_marks_are_not_paid():
    entry = item("gcd")
    score = reasoning_gym(f"Answer: {entry['answer']} or so", "", {"dataset": "gcd", "entry": entry})
    assert (score.outcome, score.reward) == ("scored", 0.0)


def test_an_entry_that_was_damaged_on_its_way_is_not_the_policys_fault():
    entry = item("rearc")  # holds tuples, of which JSON makes lists
    with pytest.raises(RuntimeError, match="entry's own answer"):
        reasoning_gym(f"Answer:\n{entry['answer']}", "", {"dataset": "rearc", "entry": entry})


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_whose_scorer_cannot_be_trusted_are_refused(family):
    with pytest.raises(InputError, match=f"'{family}' is refused: its scorer"):
        reasoning_gym("Answer: 5", "", {"dataset": family, "entry": {"answer": "5", "metadata": {}}})


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'chain_sum'"):
        reasoning_gym("Answer: 5", "", {"dataset": "chain_sums", "entry": {"answer": "5"}})
