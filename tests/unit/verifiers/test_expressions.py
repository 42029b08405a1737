from __future__ import annotations

import threading

import pytest

from srl_rlvr.verifiers.base import Score
from srl_rlvr.verifiers.expressions import expression


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("0.5", "\\frac{1}{2}"),
        ("$(x+1)^2$", "x^2+2x+1"),
        ("x**2 + 1", "x^2+1"),
        ("\\sqrt{8}", "2\\sqrt{2}"),
        ("\\boxed{2x}", "$x + x$"),
        ("x = 5", "5"),
        ("1.5", "1 1/2"),
        ("3/2", "1 1/2"),
        ("$1 1/2$", "1.5"),
        ("-1 3/4", "-1.75"),
        ("2*1 1/2", "3"),
        ("2*pi", "2\\pi"),
        ("\\pi r^2", "pi*r**2"),
        ("sin(x)**2", "\\sin^2 x"),
    ],
)
def test_equal_expressions_are_right(answer, reference):
    assert expression(f"Answer: {answer}", reference, {}).reward == 1.0


@pytest.mark.parametrize(
    "answer", ["xyzzy plugh", "__import__('os')", "()", "1, 2, 3, 4, 5", "\\infty", "{", "$$", "?"]
)
def test_garbage_scores_nothing(answer):
    score = expression(f"Answer: {answer}", "5", {})
    assert (score.outcome, score.reward) == ("scored", 0.0)


@pytest.mark.parametrize(("answer", "reference"), [("1", "1 1/2"), ("-1", "-1 1/2"), ("2ip", "2*pi")])
def test_plain_mixed_numbers_and_names_are_read_whole(answer, reference):
    assert expression(f"Answer: {answer}", reference, {}).reward == 0.0


def test_an_answer_is_never_run_as_code(tmp_path):
    path = tmp_path / "made"
    expression(f"Answer: open('{path}','w')", "5", {})
    expression(f"Answer: __import__('pathlib').Path('{path}').touch()", "5", {})
    assert not path.exists()


def test_no_answer_is_invalid():
    assert expression("no idea", "5", {}).outcome == "invalid"
    assert expression("Answer: 5", "5", {"finish_reason": "length"}).outcome == "invalid"


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("\\frac{1}{2^{98}}", "\\frac{1}{2^{99}}"),
        ("\\frac{1}{201!}", "\\frac{1}{200!}"),
        ("-0.0000001", "6.02 \\times 10^{-8}"),
        ("0", "e^{-30}"),
        ("x/2^{98}", "x/2^{99}"),
        ("x = 1/2^{98}", "x = 1/2^{99}"),
        ("(\\frac{1}{2^{98}}, 1)", "(\\frac{1}{2^{99}}, 1)"),
        ("\\{10^{-31}, 1\\}", "\\{10^{-30}, 1\\}"),
        ("10^{20} + 1", "10^{20}"),
        ("3.14", "\\pi"),
        ("0.33", "1/3"),
    ],
)
def test_what_is_small_is_compared_relatively(answer, reference):
    assert expression(f"Answer: {answer}", reference, {}).reward == 0.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("10000000.5", "10000000.500001"), ("0.333333", "1/3"), ("424264068.7", "3 \\times 10^8 \\sqrt{2}"),
     ("0", "\\sqrt{2}-\\sqrt{2}"), ("1", "\\sin^2 x + \\cos^2 x"), ("2 = x", "x = 2")],
)  # fmt: skip
def test_a_decimal_stands_for_what_it_is_near_to(answer, reference):
    assert expression(f"Answer: {answer}", reference, {}).reward == 1.0


def test_a_reference_that_cannot_be_read_is_compared_as_text():
    assert expression("Answer: A \\cup B", "A \\cup B", {}).reward == 1.0
    wrong = expression("Answer: 5", "A \\cup B", {})
    assert (wrong.outcome, wrong.reward) == ("scored", 0.0)


def test_a_reference_that_is_no_expression_is_not_the_policys_fault():
    with pytest.raises(ValueError, match="is not an expression"):
        expression("Answer: 5", "?", {})


def test_it_scores_off_the_main_thread():
    scores: list[Score] = []
    thread = threading.Thread(target=lambda: scores.append(expression("Answer: 1/2", "0.5", {})))
    thread.start()
    thread.join()
    assert scores[0].reward == 1.0
