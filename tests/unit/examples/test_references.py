"""The form of an answer decides its verifier; right answers in other forms earn 1, and wrong ones nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srl_rlvr.errors import InputError
from srl_rlvr.examples import references
from srl_rlvr.examples.files import load
from srl_rlvr.verifiers import VERIFIERS

# Each with its verifier, what is right besides itself, and what is wrong.
EXACT: dict[str, tuple[list[str], list[str]]] = {
    "21:30": (["21:30.", "9:30 pm", "9:30 P.M."], ["7:10", "21:00", "43:60", "9:30"]),
    "12:00": (["12:00 pm"], ["1:00", "0", "12 am"]),
    "7 am": (["7 a.m.", "7:00 AM"], ["7 pm", "7"]),
    "2024-01-05": ([], ["2018", "2019-01-00"]),
    "01/02/2024": ([], ["1/4048"]),
    "5/1/2024": ([], ["5/2024"]),
    "05.01.2024": ([], ["5.012024"]),
    "Jan 5, 2024": (["jan 5,  2024."], ["Jan 6, 2024"]),
    "555-1234": ([], ["-679"]),
    "(555) 123-4567": ([], ["-4012"]),
    "+1 555 123 4567": ([], ["+1 555 123 4568"]),
    "978-3-16-148410-0": ([], ["-147648"]),
    "1-0": (["1 - 0", "1–0"], ["1", "2-1"]),
    "3:2": (["3 : 2"], ["1.5", "2:3"]),
    "1.2.3": ([], ["1.2.4"]),
    "192.168.0.1": ([], ["192.168.0.2"]),
    "CO2": (["CO_2", "CO₂"], ["2CO", "OC2"]),
    "2H2 + O2": ([], ["O2 + 2H2"]),
    "No": (["no."], ["on"]),
    "it": ([], ["ti"]),
    "A1": ([], ["1A", "A"]),
    "(C)": (["C", "c"], ["D"]),
    "B+": ([], ["B"]),
    "p. 7": ([], ["7"]),
    "#3": ([], ["3"]),
    "1st": ([], ["1"]),
    "F-16": ([], ["-16+F", "F-15"]),
    "N/A": (["n/a"], ["A/N"]),
    "4x4": ([], ["16"]),
    "5-10 m": ([], ["-5"]),
    "4210_5": (["4210_{5}"], ["4210", "42105"]),
    "IV": ([], ["VI"]),
    "café": (["cafe\u0301"], ["cafe"]),
    "C:\\Users\\x": ([], []),
    "1 2 3": ([], ["6", "123"]),
}
NUMERIC: dict[str, tuple[list[str], list[str]]] = {
    "2 500 000": (["2500000", "2,500,000"], ["0", "2"]),
    "1 000": (["1000"], ["0"]),
    "1\u202f000": (["1000"], ["0"]),
    "1 234,50": (["1234.5"], ["0", "1"]),
    "1'000'000": (["1000000"], ["1"]),
    "1,00,000": (["100000", "100,000"], ["1"]),
    "1.234,56": (["1234.56"], ["1.23456"]),
    "70,000": (["70 000", "70.000,00", "$70000", "70{,}000"], ["70", "7,0000", "70,000 or 80,000"]),
    "300000000": (["3 \\times 10^8", "3e8", "3×10⁸", "3*10^8", "300 million"], ["3 \\times 10^7", "300"]),
    "1.6 \\times 10^{-19}": (["1.6e-19"], ["9.1 \\times 10^{-31}", "0"]),
    "10^8": (["100000000"], ["10^9", "108"]),
    "−5": (["-5", "minus 5", "-5 degrees"], ["5"]),
    "1e-7": (["0.0000001"], ["2e-7", "0"]),
    "$18": (["18", "18 dollars", "\\$18", "$18.00"], ["$180", "18 euros", "€18"]),
    "18 dollars": (["18", "$18"], ["180 dollars", "18 cents"]),
    "5 €": (["€5", "5 euros"], ["£5"]),
    "12 km": (["12", "12km", "12 kilometers"], ["12 m", "1.2 km", "12 km/h"]),
    "60 km/h": (["60 km per hour"], ["60 mph"]),
    "5 m^2": (["5 square meters", "5 m²"], ["5 m", "5 m^3"]),
    "37 °C": (["37 degrees Celsius", "37"], ["37 °F"]),
    "90^\\circ": (["90", "90 degrees"], ["90\\pi", "90%"]),
    "50%": (["50", "50 percent", "50\\%", "0.5"], ["5%", "0.005"]),
    "0.18": (["18%"], ["1.8"]),
    "5.4 \\text{ cents}": (["5.4"], ["5.4 dollars"]),
    "2.5 hours": (["2 1/2 hours", "2½"], ["2.5 minutes"]),
    "\\boxed{5}": (["5", "$5$"], ["6"]),
    "≈ 3.14": (["3.14"], ["3.1"]),
}
EXPRESSION: dict[str, tuple[list[str], list[str]]] = {
    "½": (["1/2", "0.5", "\\frac{1}{2}"], ["1", "12"]),
    "3½": (["3.5"], ["31/2"]),
    "3²": (["9"], ["32"]),
    "√2": (["\\sqrt{2}"], ["2"]),
    "2π": (["2\\pi"], ["2"]),
    "0.\\overline{3}": (["1/3"], ["0.3"]),
    "\\frac{1}{2^{99}}": (["2^{-99}"], ["\\frac{1}{2^{98}}", "0"]),
    "A \\cup B": ([], ["B"]),
    "3 and -3": (["-3 and 3", "3, -3", "\\pm 3"], ["3", "-3", "9"]),
    "x = 1 or x = -2": (["x=-2, x=1"], ["x=1"]),
    "(0, 12.5)": (["0 < x < 12.5"], ["[0, 12.5]", "(0, 1.5)"]),
    "−2 ≤ x ≤ 7": (["-2 \\le x \\le 7"], ["-2 < x < 7"]),
    "\\{1, 2, 3\\}": (["1, 3, 2"], ["\\{1, 2\\}"]),
    "(1,2)": ([], ["(2,1)"]),
    "1 000, 2 000": (["1000, 2000"], ["0, 0", "0"]),
    "\\frac 1 2": (["0.5"], ["1, 2", "1/2 1", "1 2"]),
    "-∞": (["-\\infty"], ["\\infty"]),
    "2x+3": (["3+2x"], ["2x-3"]),
    "6 - 5i": (["-5i + 6"], ["6 + 5i"]),
    "1/3": (["0.3333333"], ["0.33"]),
    "ln 2": (["\\ln 2"], ["2"]),
    "5!": (["120"], ["5"]),
}
CASES = [
    (verifier, reference, *forms)
    for verifier, table in (("exact", EXACT), ("numeric", NUMERIC), ("expression", EXPRESSION))
    for reference, forms in table.items()
]


@pytest.mark.parametrize(("verifier", "answer", "right", "wrong"), CASES, ids=[case[1] for case in CASES])
def test_the_form_of_an_answer_decides_what_is_right(verifier: str, answer: str, right: list[str], wrong: list[str]):
    reference, found = references.reference_of(answer)
    assert found == verifier
    given = [f"Answer: {answer}", f"So it is $\\boxed{{{answer}}}$", *(f"Answer: {form}" for form in right)]
    rewards = {text: VERIFIERS[verifier](text, reference, {}).reward for text in given}
    assert rewards == dict.fromkeys(given, 1.0)
    rewards = {form: VERIFIERS[verifier](f"Answer: {form}", reference, {}).reward for form in wrong}
    assert rewards == dict.fromkeys(wrong, 0.0)


def file_of(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"question": "1 + 1?", "answer": 2}


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "first line\nsecond line"},
        {"answer": "<think>5</think>"},
        {"answer": "five", "verifier": "numeric"},
    ],
)
def test_an_answer_that_nobody_can_give_is_a_wrong_row(tmp_path: Path, row: dict[str, Any]):
    path = file_of(tmp_path, GOOD, {"question": "q", **row})
    with pytest.raises(InputError, match="a.jsonl, row 2: "):
        load(path)
    assert load(path, skip_bad=True)["reference"].to_pylist() == ["2"]
    assert load(path, unanswered=True).num_rows == 2


def test_a_formula_that_never_ends_is_a_wrong_row_and_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(references, "DEADLINE_S", 1.0)
    monkeypatch.setattr(references, "_known", {})
    path = file_of(tmp_path, GOOD, {"question": "q", "answer": "9^{9^{9^9}}"}, {"question": "?", "answer": "x^2 + 1"})
    with pytest.raises(InputError, match="row 2: verifier 'expression' cannot judge any answer: timed out"):
        load(path)
    assert load(path, skip_bad=True)["reference"].to_pylist() == ["2", "x^2 + 1"]


@pytest.mark.parametrize(
    ("answer", "reference", "steps"),
    [
        ("Answer: 5", "5", []),
        ("2 + 2 = 4\nAnswer: 4", "4", ["2 + 2 = 4"]),
        ("We add.\nSo $\\boxed{7}$", "7", ["We add.", "So $\\boxed{7}$"]),
    ],
)
def test_an_answer_that_is_marked_in_a_solution_is_found(tmp_path: Path, answer: str, reference: str, steps: list[str]):
    for row in ({"question": "q", "answer": answer}, {"problem": "q", "solution": answer}):
        [example] = load(file_of(tmp_path, row)).to_pylist()
        assert (example["reference"], example["verifier"], example["prompt"]) == (reference, "numeric", "q")
    [example] = load(file_of(tmp_path, {"question": "q", "answer": answer})).to_pylist()
    assert example["steps"] == steps
