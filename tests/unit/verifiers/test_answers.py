from __future__ import annotations

from fractions import Fraction

import pytest

from srl_rlvr.verifiers.answers import choice, exact, extract_answer, numeric, read_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3 = 5\nAnswer: 5", "5"),
        ("Answer: 4\nNo.\nFINAL ANSWER:  5 \nbye", "5"),
        ("**Answer:** 5", "5"),
        ("**Answer: 5**", "5"),
        ("Answer:\n1 2\n3 4\n\nThat is all.", "1 2\n3 4"),
        ("Answer: $\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("so \\boxed{1} or \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("Answer: 5, not \\boxed{6", "5, not \\boxed{6"),
        ("work\n#### 7", "7"),
        ("Answer:\nsee \\boxed{3}", "3"),
        ("Answer: 4\n<think>Answer: 5</think>", "4"),
        ("<think>Answer: 5</think>no idea", None),
        ("<think>Answer: 5", None),
        ("Answer: 5</think>well", None),
        ("the result is 5", None),
        ("Answer:", None),
        ("\\boxed{}", None),
        ("\\boxed{5", None),
        ("", None),
    ],
)
def test_the_final_answer_is_what_was_marked_last_outside_the_thoughts(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12),
        ("-12", -12),
        ("\N{MINUS SIGN}12", -12),
        ("+3", 3),
        ("12.", 12),
        ("12.50", Fraction(25, 2)),
        (".5", Fraction(1, 2)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("$1,200", 1200),
        ("-$5", -5),
        ("\\$5", 5),
        ("50%", 50),
        ("50\\%", 50),
        ("12 apples", 12),
        ("12 km^2", 12),
        ("12\\text{ cm}^2", 12),
        ("The total is 12 apples.", 12),
        ("3 + 4 = 7", 7),
        ("x = -5", -5),
        ("1/2", Fraction(1, 2)),
        ("-3/4 cup", Fraction(-3, 4)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("\\frac12", Fraction(1, 2)),
        ("-\\dfrac{1}2", Fraction(-1, 2)),
        ("- \\frac{1}{2}", Fraction(-1, 2)),
        ("\N{EN DASH}5", -5),
        ("-(5)", -5),
        ("-\\left(5\\right)", -5),
        ("$1{,}234$", 1234),
        ("Rs3", 3),
        ("Rs.300", 300),
        ("1e3", 1000),
        ("1.5e-3", Fraction(3, 2000)),
        ("1e2", 100),
        ("nan", None),
        ("inf", None),
        ("-Infinity", None),
        ("twelve", None),
        ("", None),
        ("12 or 13", None),
        ("10-12", None),
        ("10\N{EN DASH}12", None),
        ("2\\frac{1}{2}", None),
        ("1,23", None),
        ("1234,567", None),
        ("1/0", None),
        ("1/2/3", None),
        ("1.2.3", None),
        ("1e99999999", None),
        ("9" * 5000, None),
        ("٣", None),
    ],
)
def test_a_number_is_read_exactly_or_not_at_all(text, number):
    assert read_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["\\sqrt{9}", "-\\sqrt{9}", "\\sqrt\\left(9\\right)", "sqrt(9)", "\\ln 9", "sin 9", "f(9)", "\\pm 9",
     "-(-9)", "9!", "9²",
     "9\\pi", "9 pi", "9x", "9*x", "9x^2", "9\\cdot x", "9^n", "x^9", "\\frac{x}{9}", "9/x", "9\\sqrt{x}", "\\frac923"],
)  # fmt: skip
def test_a_number_in_a_formula_is_not_the_answer(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    "text",
    ["9m", "9 m", "9s", "9kg", "9 cm^2", "9 m2", "9 tons of CO2", "9°C", "9^\\circ", "9 sec", "9 a day", "$9/hour",
     "9 apples!", "9 hour(s)", "9^{th}", "\\(9\\)", "\\text{Total: }9\\text{ cm}"],
)  # fmt: skip
def test_units_and_words_beside_a_number_leave_it_alone(text):
    assert read_number(text) == 9


def test_a_right_number_earns_one_and_a_wrong_one_nothing():
    assert numeric("Answer: $1,200.00", "1200", {}).reward == 1.0
    wrong = numeric("Answer: 1201", "1200", {})
    assert (wrong.outcome, wrong.reward, dict(wrong.components)) == ("scored", 0.0, {"correct": 0.0})
    assert numeric("Answer: 0.1", "1/10", {}).reward == 1.0
    assert numeric("Answer: 0.3333", "1/3", {}).reward == 0.0


def test_the_tolerance_is_relative_to_the_reference():
    assert numeric("Answer: 0.3333", "1/3", {"tolerance": 1e-3}).reward == 1.0
    assert numeric("Answer: 101", "-100", {"tolerance": 0.02}).reward == 0.0
    assert numeric("Answer: 102.1", "100", {"tolerance": 0.02}).reward == 0.0
    assert numeric("Answer: 98", "100", {"tolerance": 0.02}).reward == 1.0


def test_without_a_mark_the_last_number_is_the_answer():
    assert numeric("3 apples and 4 pears are 7 fruits", "7", {}).reward == 1.0
    assert numeric("<think>7</think>3 apples", "7", {}).reward == 0.0


def test_listing_numbers_does_not_earn_the_reward():
    assert numeric("Answer: 1 2 3 4 5 6 7", "7", {}).reward == 0.0


def test_a_reference_that_is_no_number_is_not_the_policys_fault():
    with pytest.raises(ValueError, match="not a number"):
        numeric("Answer: 5", "five", {})


@pytest.mark.parametrize("verifier", [exact, numeric, choice])
def test_no_answer_is_invalid_at_the_stages_price(verifier):
    for text in ("", "no idea", "<think>Answer: 5"):
        assert (verifier(text, "5", {}).outcome, verifier(text, "5", {}).reward) == ("invalid", 0.0)
    cut_off = verifier("Answer: 5", "5", {"finish_reason": "length", "invalid_reward": -0.5})
    assert (cut_off.outcome, cut_off.reward) == ("invalid", -0.5)


def test_exact_folds_case_white_space_and_the_full_stop():
    assert exact("Answer:  New   York.", "new york", {}).reward == 1.0
    assert exact("Answer: York", "New York", {}).reward == 0.0
    assert exact("Answer: New York or Boston", "New York", {}).reward == 0.0


@pytest.mark.parametrize(
    "text",
    ["B", "b", "(B)", "B) 12", "B. twelve", "**B**", "Option B", "\\boxed{\\text{(B)}}",
     "The answer is B", "$B$", "'B'", "“B”",
     "\\textbf{B}", "\\mathrm{B}", "$\\text{(B)}$", "The correct answer is (B).",
     "Option B is right", "B is the answer", "B - 12",
     "B \N{EN DASH} 12", "B) B", "B) 10 a.m.", "B) A:C = 2:3", "B) P(A) = 1/2"],
)  # fmt: skip
def test_a_letter_is_recognized_in_its_usual_forms(text):
    assert choice(f"Answer: {text}", "B", {}).reward == 1.0
    assert choice(f"Answer: {text}", "(A)", {}).reward == 0.0


@pytest.mark.parametrize(
    "text", ["A cat", "12", "A or B", "All of them", "F", "the answer is a cat", "The answer is not A", "A is wrong"]
)
def test_what_names_no_letter_is_wrong(text):
    assert choice(f"Answer: {text}", "A", {}).reward == 0.0


@pytest.mark.parametrize(
    "text",
    ["A, B, C, D", "a, b, c, d", "(A) or (B)", "A) B) C)", "A)5 B)6", "A. B.", "A - 5, B - 6",
     "Option A or option B", "A, not B",
     "A is right, B is right"],
)  # fmt: skip
def test_a_hedge_earns_nothing(text):
    assert choice(f"Answer: {text}", "A", {}).reward == 0.0


def test_labels_are_whole_words_and_only_one_of_them():
    labels = {"labels": ["True", "False", "Unknown"]}
    assert choice("Answer: it is true.", "True", labels).reward == 1.0
    assert choice("Answer: True or False", "True", labels).reward == 0.0
    assert choice("Answer: untrue", "True", labels).reward == 0.0
    nested = {"labels": ["relevant", "not relevant"]}
    assert choice("Answer: not relevant", "relevant", nested).reward == 0.0
    assert choice("Answer: not relevant", "not relevant", nested).reward == 1.0
