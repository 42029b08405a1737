"""Which rows come next: nothing is skipped or repeated, and levels that tell more come more often."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest

from srl_rlvr.examples.curriculum import Informative, Order, Uniform, levels
from srl_rlvr.examples.generated import generate

TRUNKS = ["a", "a", "a", "b", "c", "c", "d"]


def test_an_epoch_visits_every_row_once_and_the_steps_of_a_trunk_together() -> None:
    order = Order(TRUNKS, 0, "srl")
    for epoch in range(3):
        rows = order.take(epoch * 7, 7)
        assert sorted(rows) == list(range(7))
        visited = [TRUNKS[row] for row in rows]
        assert len([name for i, name in enumerate(visited) if i == 0 or visited[i - 1] != name]) == 4
        for name in "ac":
            of_trunk = [row for row in rows if TRUNKS[row] == name]
            assert of_trunk == sorted(of_trunk)


def test_epochs_seeds_and_stages_differ_in_order() -> None:
    names = [str(n) for n in range(20)]
    order = Order(names, 0, "srl")
    rows = [
        order.take(0, 20),
        order.take(20, 20),
        Order(names, 1, "srl").take(0, 20),
        Order(names, 0, "rlvr").take(0, 20),
    ]
    assert len({tuple(each) for each in rows}) == 4


def test_the_stream_goes_on_at_any_cursor() -> None:
    stream = [row for epoch in range(3) for row in Order(TRUNKS, 3, "srl").take(7 * epoch, 7)]
    for cursor in range(18):
        assert Order(TRUNKS, 3, "srl").take(cursor, 1) == stream[cursor : cursor + 1]


def test_no_row_comes_twice_in_one_batch() -> None:
    order = Order(TRUNKS, 0, "srl")
    for cursor in range(30):
        rows = order.take(cursor, 7)
        assert len(rows) == len(set(rows)) >= 1
    assert len(order.take(0, 50)) == 7


def test_uniform_goes_on_where_its_state_says() -> None:
    state: dict[str, Any] = {}
    first = Uniform(TRUNKS, 0, "srl", state)
    rows = first.take(3) + first.take(2)
    again = Uniform(TRUNKS, 0, "srl", json.loads(json.dumps(state)))
    assert rows + again.take(2) == Order(TRUNKS, 0, "srl").take(0, 7)


# Informative: three levels of ten problems, two rows each


ARMS = [level for level in ("easy", "middle", "hard") for _ in range(20)]
ROWS = [f"{level}{i // 2}" for level in ("easy", "middle", "hard") for i in range(20)]
PASSED = {"easy": [1] * 8, "middle": [0, 1] * 4, "hard": [0] * 8}  # of eight samples


def drawn(state: dict[str, Any], batches: int, passed: dict[str, list[int]] = PASSED) -> list[list[int]]:
    selector = Informative(ROWS, ARMS, 0, "rlvr", state)
    found = []
    for _ in range(batches):
        rows = selector.take(8)
        selector.learn([(row, passed[ARMS[row]]) for row in rows])
        found.append(rows)
    return found


def test_with_repeats_every_row_comes_as_often_as_the_epochs_say() -> None:
    names, state = ["a", "b", "c"], {}
    selector = Uniform(names, 0, "sft", state, repeats=True)
    taken = Counter(row for _ in range(3) for row in selector.take(8))
    assert taken == {0: 8, 1: 8, 2: 8} and state["cursor"] == 24


def test_a_level_is_a_family_with_its_params_and_the_number_of_steps() -> None:
    params = {"min_terms": 2, "max_terms": 4, "operators": ["+"], "allow_parentheses": False, "allow_negation": False}
    parts = [generate("basic_arithmetic", 20, 0, params | {"max_digits": digits}) for digits in (1, 3)]
    found = levels(pa.concat_tables(parts))
    assert len(set(found)) == 6
    assert not set(found[:20]) & set(found[20:])


def test_levels_near_one_half_come_most_and_none_is_forgotten() -> None:
    rows = [row for batch in drawn({}, 60)[10:] for row in batch]
    counts = Counter(ARMS[row] for row in rows)
    assert counts["middle"] > 0.7 * len(rows)
    assert min(counts.values()) > 0 and len(counts) == 3


def test_it_follows_a_policy_that_improves() -> None:
    state: dict[str, Any] = {}
    drawn(state, 30)
    improved = {"easy": [1] * 8, "middle": [1] * 8, "hard": [0, 1] * 4}
    later = [row for batch in drawn(state, 30, improved)[10:] for row in batch]
    assert Counter(ARMS[row] for row in later)["hard"] > 0.6 * len(later)


def test_a_batch_holds_no_row_twice_and_keeps_trunks_together() -> None:
    for batch in drawn({}, 50):
        assert len(batch) == len(set(batch)) == 8
        names = [ROWS[row] for row in batch]
        assert len([n for i, n in enumerate(names) if i == 0 or names[i - 1] != n]) == len(set(names))


def test_a_batch_larger_than_all_problems_ends_early() -> None:
    assert sorted(Informative(["a", "b", "b"], ["x", "y", "y"], 0, "rlvr", {}).take(9)) == [0, 1, 2]


def test_every_problem_of_a_level_comes_in_turn() -> None:
    rows = [row for batch in drawn({}, 60) for row in batch if ARMS[row] == "middle"]
    counts = Counter(rows)
    assert set(counts) == {row for row, arm in enumerate(ARMS) if arm == "middle"}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_state_says_everything_about_what_comes_next() -> None:
    state: dict[str, Any] = {}
    drawn(state, 5)
    copied = json.loads(json.dumps(state))
    assert drawn(state, 5) == drawn(copied, 5)


def test_one_level_that_teaches_is_found_among_many_that_do_not() -> None:
    arms = [str(level) for level in range(16) for _ in range(48)]
    selector = Informative([str(row) for row in range(len(arms))], arms, 0, "rlvr", {})
    batches = []
    for _ in range(12):
        batches.append(selector.take(8))
        selector.learn([(row, [0, 1] * 4 if arms[row] == "0" else [0] * 8) for row in batches[-1]])
    late = [arms[row] for batch in batches[6:] for row in batch]
    assert late.count("0") > 0.8 * len(late)


def test_a_level_half_of_whose_problems_are_always_solved_does_not_seem_informative() -> None:
    arms = [level for level in ("mixed", "uneven") for _ in range(60)]
    selector = Informative([str(row) for row in range(120)], arms, 0, "rlvr", {})
    late = []
    for batch in range(12):
        rows = selector.take(8)
        late += [arms[row] for row in rows] if batch >= 6 else []
        # Both have a pass rate of one half; only in the first do the samples of a problem differ.
        selector.learn([(row, [row % 2] * 8 if arms[row] == "uneven" else [0, 1] * 4) for row in rows])
    assert late.count("mixed") > 0.8 * len(late)


def test_graded_rewards_count_by_how_much_they_differ() -> None:
    state: dict[str, Any] = {}
    selector = Informative(["a", "b"], ["near", "far"], 0, "srl", state)
    selector.learn([(0, [0.5, 0.6]), (1, [0.1, 0.9, -1.0])])
    assert state["arms"]["near"] == {"cursor": 0, "differ": pytest.approx(0.1), "alike": pytest.approx(0.9)}
    selector.learn([(0, []), (0, [1.0])])  # of a group whose other samples could not be judged nothing is learned
    assert state["arms"]["near"]["alike"] == pytest.approx(0.9)
    assert state["arms"]["far"] == {"cursor": 0, "differ": pytest.approx(1.5 * 0.6), "alike": pytest.approx(0.6)}
