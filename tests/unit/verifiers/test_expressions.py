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


def test_a_reference_that_is_no_expression_is_not_the_policys_fault():
    with pytest.raises(ValueError, match="is not an expression"):
        expression("Answer: 5", "?", {})


def test_it_scores_off_the_main_thread():
    scores: list[Score] = []
    thread = threading.Thread(target=lambda: scores.append(expression("Answer: 1/2", "0.5", {})))
    thread.start()
    thread.join()
    assert scores[0].reward == 1.0
