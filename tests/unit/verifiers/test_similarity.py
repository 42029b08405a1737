from __future__ import annotations

import difflib
import random

import pytest

from srl_rlvr.errors import InputError
from srl_rlvr.verifiers.similarity import _TOKEN, similarity

ALPHABETS = ("ab", "abcdefgh  \n", "aé漢😀 \n", "".join(map(chr, range(33, 300))))
LENGTHS = (1, 2, 3, 5, 20, 100, 199, 200, 201, 202, 297, 500)


def reference_ratio(action: str, expert: str) -> float:
    return difflib.SequenceMatcher(None, action, expert, autojunk=False).ratio()


def test_similarity_equals_difflib_on_random_strings_of_every_length():
    rng = random.Random(0)
    for alphabet in ALPHABETS:
        for length in LENGTHS:
            action = "x" + "".join(rng.choices(alphabet, k=length))
            changed = "".join(rng.choice(alphabet) if rng.random() < 0.2 else c for c in action)
            for expert in (changed, "".join(rng.choices(alphabet, k=max(0, length + rng.randint(-9, 9))))):
                score = similarity(action, expert, {})
                assert score.reward == reference_ratio(action, expert), (action, expert)


def test_frequent_characters_of_long_actions_are_not_taken_for_junk():
    words = [f"word{i}" for i in range(50)]
    action = " ".join(words)
    expert = " ".join("xyz" if i % 5 == 0 else word for i, word in enumerate(words))
    assert min(len(action), len(expert)) > 200
    assert similarity(action, expert, {}).reward > 0.8 > difflib.SequenceMatcher(None, action, expert).ratio()


def test_the_action_is_the_first_sequence():
    first, second = "tide", "diet"
    assert reference_ratio(first, second) != reference_ratio(second, first)
    assert similarity(first, second, {}).reward == reference_ratio(first, second)
    assert similarity(second, first, {}).reward == reference_ratio(second, first)


def test_words_and_tokens_equal_difflib_on_lists():
    action, expert = "take 12 from 30,  leaving 18\n", "take 12 away from 30, leaving 28\n"
    words = difflib.SequenceMatcher(None, action.split(), expert.split(), autojunk=False).ratio()
    assert similarity(action, expert, {"measure": "words"}).reward == words
    split = _TOKEN.findall
    assert "".join(split(action)) == action
    tokens = difflib.SequenceMatcher(None, split(action), split(expert), autojunk=False).ratio()
    assert similarity(action, expert, {"measure": "tokens"}).reward == tokens


def test_lcs_is_at_least_the_ratio_of_matching_blocks():
    pytest.importorskip("rapidfuzz")
    assert similarity("tide", "diet", {"measure": "lcs"}).reward == 0.5
    assert reference_ratio("tide", "diet") <= 0.5


def test_an_unknown_measure_is_the_users_mistake():
    with pytest.raises(InputError, match="measure 'bleu' is unknown"):
        similarity("a", "a", {"measure": "bleu"})


def test_only_what_follows_the_thoughts_is_compared():
    for thoughts in ("", "2 + 3", "anything at all\n\n" * 50):
        score = similarity(f"<think>{thoughts}</think>\n\n2 + 3 = 5\n", "2 + 3 = 5\n", {"think": True})
        assert (score.outcome, score.reward, dict(score.components)) == ("scored", 1.0, {"similarity": 1.0})


def test_an_action_of_several_lines_may_have_a_thought_before_each():
    expert = "2 + 3 = 5\n5 + 1 = 6\nAnswer: 6"
    for text in (
        "<think>hm</think>2 + 3 = 5\n<think>5, and 1\n</think> 5 + 1 = 6\n<think></think>Answer: 6",
        "<think>hm</think>2 + 3 = 5\n<think></think>5 + 1 = 6\nAnswer: 6",
        "<think>hm</think>" + expert,
    ):
        assert similarity(text, expert, {"think": True}).reward == 1.0


def test_the_line_break_at_the_end_counts():
    assert similarity("<think></think> ab\n", "ab\n", {"think": True}).reward == 1.0
    assert similarity("<think></think> ab", "ab\n", {"think": True}).reward == reference_ratio("ab", "ab\n") < 1.0


@pytest.mark.parametrize(
    ("text", "metadata"),
    [
        ("2 + 3 = 5\n", {"think": True}),
        ("<think>hm 2 + 3 = 5\n", {"think": True}),
        ("hm</think>2 + 3 = 5\n", {"think": True}),
        ("</think><think>2 + 3 = 5\n", {"think": True}),
        ("well <think>hm</think>2 + 3 = 5\n", {"think": True}),
        ("<think>hm</think><think>hm</think>2 + 3 = 5\n", {"think": True}),
        ("<think>hm</think>2 + 3 = 5</think>\n", {"think": True}),
        ("<think>hm</think>2 + 3 = 5\n<think>5 + 1 = 6", {"think": True}),
        ("<think>hm</think>2 + 3 = 5\n<think>hm</think>\n", {"think": True}),
        ("<think>hm<think>hm</think></think>2 + 3 = 5\n", {"think": True}),
        ("<think>hm</think>2 + 3 = <think>5</think>5\n", {"think": True}),
        ("<think>hm</think> \n", {"think": True}),
        ("<think>hm</think>2 + 3 = 5\n", {"think": False}),
        ("2 + 3 = 5</think>\n", {}),
        ("", {}),
        (" \n", {}),
        ("2 + 3 = 5\n", {"finish_reason": "length"}),
        ("<think>hm</think>2 + 3 = 5\n", {"think": True, "finish_reason": "length"}),
    ],
)
def test_a_broken_format_is_invalid_at_minus_one(text, metadata):
    score = similarity(text, "2 + 3 = 5\n", metadata)
    assert (score.outcome, score.reward, dict(score.components)) == ("invalid", -1.0, {"format": -1.0})
    assert score.detail
