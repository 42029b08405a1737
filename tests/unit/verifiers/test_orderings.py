"""What orderings are worth, by hand."""

from __future__ import annotations

import math

import pytest

from srl_rlvr.verifiers import find_verifier
from srl_rlvr.verifiers.orderings import label, ndcg, pick, reciprocal_rank

GAINS = '{"3": 2, "1": 1}'


@pytest.mark.parametrize(
    ("text", "taken", "reward"),
    [("3", [], 1.0), ("1", [], 0.5), ("0", [], 0.0), ("1", [3], 1.0), ("0", [3], 0.0), ("0", [3, 1], 1.0)],
)
def test_a_pick_is_worth_its_gain_relative_to_the_best_that_is_left(text: str, taken: list[int], reward: float) -> None:
    assert pick(text, GAINS, {"taken": taken}).reward == reward


def test_ndcg_is_one_for_the_ideal_order_and_discounts_by_rank() -> None:
    assert ndcg("3 1 0", GAINS, {}).reward == pytest.approx(1.0)
    ideal = 2 + 1 / math.log2(3)
    assert ndcg("0 3 2 1", GAINS, {}).reward == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert ndcg("0 2 4", GAINS, {}).reward == 0.0


def test_what_is_relevant_and_no_candidate_counts_against_the_order() -> None:
    assert ndcg("0 1", '{"0": 1}', {"relevant": [1, 1]}).reward == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert ndcg("0 1", "{}", {"relevant": [1]}).reward == 0.0


def test_only_the_first_ten_count() -> None:
    far = " ".join(map(str, [*range(10, 20), 3]))
    assert ndcg(far, GAINS, {}).reward == 0.0 and reciprocal_rank(far, GAINS, {}).reward == 0.0


def test_reciprocal_rank_is_of_the_first_that_has_a_gain() -> None:
    assert reciprocal_rank("0 2 1 3", GAINS, {}).reward == pytest.approx(1 / 3)


def test_a_wrong_label_costs_what_is_said_of_it() -> None:
    costs = {"costs": {"4": 0.5}}
    assert [label(text, '{"2": 1}', costs).reward for text in ("2", "4", "0")] == [1.0, -0.5, 0.0]
    assert label("4", '{"2": 1}', costs).components == {"accuracy": 0.0}


@pytest.mark.parametrize("name", ["pick", "ndcg", "reciprocal_rank", "label"])
def test_they_are_found_by_name(name: str) -> None:
    assert callable(find_verifier(name))
