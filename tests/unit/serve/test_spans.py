"""Where spans stand in the text."""

from __future__ import annotations

from typing import Any

import pytest

from serve import spans


def pointed_at(frames: list[dict[str, Any]], text: str) -> list[list[tuple[int, int] | None]]:
    """Of each frame the places of its predicate and its roles."""

    def place(span: Any) -> tuple[int, int] | None:
        return None if span.start is None else (span.start, span.end)

    return [[place(frame.predicate), *map(place, frame.roles)] for frame in spans.placed(frames, text)]


@pytest.mark.parametrize(
    ("span", "text", "wanted"),
    [
        ("he", "The man is what he is", [(16, 18)]),
        ("is", "The man is what he is", [(8, 10), (19, 21)]),
        ("New York", "She likes New\nYork", [(10, 18)]),
        ("New York", "New York, New \t York", [(0, 8), (10, 20)]),
        ("$5 (net)", "It costs $5 (net).", [(9, 17)]),
        ("'s", "He's here", [(2, 4)]),
        ("n't", "They don't", [(7, 10)]),
        ("she", "The man is what he is", []),
        ("a.c", "abc", []),
        (" ", "a b", []),
    ],
)
def test_a_span_is_found_as_whole_words_whatever_the_white_space(
    span: str, text: str, wanted: list[tuple[int, int]]
) -> None:
    assert spans.places(span, text) == wanted


def test_the_nth_frame_of_a_predicate_is_of_its_nth_occurrence() -> None:
    frame = {"predicate": "is"}
    assert pointed_at([frame] * 3, "The man is what he is") == [[(8, 10)], [(19, 21)], [None]]


def test_a_role_that_occurs_twice_is_the_one_nearest_to_its_predicate() -> None:
    text = "the dog saw a cat and the dog ran"
    frames = [{"predicate": "saw", "ARG0": "the dog", "ARG1": "a cat"}, {"predicate": "ran", "ARG0": "the dog"}]
    assert pointed_at(frames, text) == [[(8, 11), (0, 7), (12, 17)], [(30, 33), (22, 29)]]


def test_the_predicate_is_not_taken_for_a_role_of_the_same_word() -> None:
    assert pointed_at([{"predicate": "play", "ARG1": "play"}], "They play one play") == [[(5, 9), (14, 18)]]


def test_a_role_is_placed_where_its_predicate_is_not_and_each_of_a_list_by_itself() -> None:
    frames = [{"predicate": "flew", "ARGM": ["home", "at noon", "by car"]}]
    assert pointed_at(frames, "home at noon, home") == [[None, (0, 4), (5, 12), None]]
