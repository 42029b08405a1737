"""LaTeX and formulas: equal where math-verify finds them equal. Never runs what the policy wrote."""

from __future__ import annotations

import logging
import re
import unicodedata
from typing import Any

from srl_rlvr.verifiers.answers import CUT_OFF, NO_ANSWER, extract_answer, same_text, unwrapped, without_blank_groups
from srl_rlvr.verifiers.base import Score, graded, unanswered

WORK_OUT = "work_out"  # in the metadata: work the reference out even if the answer is the same text
TOLERANCE = 1e-6  # relative, between a decimal and what it stands for
_EXACT = 1e-12  # relative, between two numbers that are no decimals, as they are worked out
_DIGITS = 30

_MIXED_NUMBER = re.compile(r"(?<![\w.,^])([0-9]+)\s+([0-9]+/[0-9]+)(?![\w./])")
_PLAIN_NAME = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|ln|log|exp)(?![A-Za-z])")
_SIGNS = {
    **{
        "π": r"\pi ",
        "√": r"\sqrt ",
        "∞": r"\infty ",
        "∅": r"\emptyset ",
        "±": r"\pm ",
        "·": r"\cdot ",
        "×": r"\times ",
    },
    **{
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "÷": r"/",
        "°": r"^\circ ",
    },
    **{"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "≈": "", "⋅": r"\cdot ", "θ": r"\theta ", "α": r"\alpha "},
}
_AS_LATEX = str.maketrans(_SIGNS)
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")
_VULGAR = re.compile("[0-9]?[¼-¾⅐-⅞↉]")
_ROOT = re.compile(r"\\sqrt\s+([0-9]+(?:\.[0-9]+)?|\()")
_REPEATING = re.compile(r"([0-9]+)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{([0-9]+)\}|([0-9]))")
_AND = re.compile(r"\s*,?\s*(?:\\(?:text|mbox|mathrm)\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*")
_ARGUMENTS = re.compile(r"\\(?:[dtc]?frac|[dt]?binom)\s*[0-9]")
_BLANK = re.compile(r"(?<=[0-9])\s+(?=[0-9])")
_SCIENTIFIC = re.compile(r"(?<![\w.])([0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]{1,3})(?!\w)")


def expression(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """1 where the final answer is mathematically equal to the reference, which may be LaTeX or plain ("x**2 + 1").

    A decimal stands for what it is near to, relatively. A reference that math-verify cannot read is compared as text.
    Raises ValueError where it has neither letters nor digits. May run for ever: needs the pool's deadline.
    """
    right = _parsed(reference)
    if not right and not any(map(str.isalnum, reference)):
        raise ValueError(f"the reference {reference!r} is not an expression")
    if metadata.get("finish_reason") == "length":
        return unanswered(metadata, CUT_OFF)
    answer = extract_answer(text)
    if answer is None:
        return unanswered(metadata, NO_ANSWER)
    if same_text(answer, reference):
        if right and metadata.get(WORK_OUT):
            _equal(right, right)
        return graded(True, f"answered {answer!r}")
    if not right:
        return graded(False, f"answered {answer!r}: not the same text")
    found = _parsed(answer)
    if not found:
        return graded(False, f"answered {answer!r}: not an expression")
    return graded(_equal(right, found), f"answered {answer!r}")


def _equal(right: list[Any], found: list[Any]) -> bool:
    import math_verify

    one, other = right[0], found[0]
    if _is_number(one) and _is_number(other):
        return _same_number(one, other)
    # The time-out is a signal.alarm, which fails off the main thread and scores 0: the pool kills instead.
    equal = math_verify.verify(right, found, allow_set_relation_comp=True, timeout_seconds=None)
    return equal and not _apart(one, other)


def _is_number(value: Any) -> bool:
    import sympy

    return isinstance(value, sympy.Expr) and value.is_number and not value.has(sympy.UnevaluatedExpr)


def _same_number(one: Any, other: Any) -> bool:
    import sympy

    one, other = one.doit(), other.doit()
    if one == other or (one.is_Rational and other.is_Rational):
        return bool(one == other)
    with_decimals = one.has(sympy.Float) or other.has(sympy.Float)
    values = [sympy.N(sympy.nsimplify(of, rational=True) if of.is_Float else of, _DIGITS) for of in (one, other)]
    if not all(value.is_number and value.is_finite for value in values):
        return False
    apart, largest = abs(values[0] - values[1]), max(map(abs, values))
    if bool(apart <= largest * (TOLERANCE * (1 + 1e-9) if with_decimals else _EXACT)):
        return True
    return not with_decimals and bool((one - other).equals(0))  # both are 0, and no digits can tell


def _apart(one: Any, other: Any) -> bool:
    """Whether two values that math-verify takes for equal differ in a number: it rounds what is small to 0."""
    import sympy

    if _is_number(one) and _is_number(other):
        return not _same_number(one, other)
    if isinstance(one, sympy.MatrixBase) and isinstance(other, sympy.MatrixBase):
        return any(map(_apart, one.flat(), other.flat()))
    if isinstance(one, sympy.FiniteSet) and isinstance(other, sympy.FiniteSet):
        return any(all(_apart(each, of) for of in other.args) for each in one.args)
    if isinstance(one, sympy.Eq) and isinstance(other, sympy.Eq):
        return one.lhs == other.lhs and _apart(one.rhs, other.rhs)
    if isinstance(one, sympy.Interval | sympy.Tuple) and type(one) is type(other) and len(one.args) == len(other.args):
        return any(map(_apart, one.args, other.args))
    symbols = one.free_symbols if isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr) else set()
    if symbols and symbols == other.free_symbols:
        names = sorted(symbols, key=str)
        values: Any = {symbol: sympy.Rational(number, 7) for number, symbol in enumerate(names, start=11)}
        sides = [side.doit().subs(values) for side in (one, other)]
        return all(map(_is_number, sides)) and not _same_number(*sides)
    return False


def _parsed(text: str) -> list[Any]:
    import math_verify

    boxed = "\\boxed{" + _as_latex(text) + "}"
    # LaTeX only: math-verify's plain expressions go through sympy's parse_expr, which evaluates code.
    return math_verify.parse(
        boxed,
        extraction_config=[math_verify.LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # type: ignore[arg-type]
    )


def _as_latex(text: str) -> str:
    """Plain mathematics as LaTeX that is read alike: "1 1/2" is a sum, pi is not p times i, "√2" is a root."""
    text = unwrapped(text.strip()).strip("$").replace("**", "^")
    text = _VULGAR.sub(_fraction, text)
    text = _SUPERSCRIPTS.sub(lambda power: f"^{{{unicodedata.normalize('NFKC', power[0])}}}", text).translate(_AS_LATEX)
    text = _ROOT.sub(lambda root: r"\sqrt(" if root[1] == "(" else rf"\sqrt{{{root[1]}}}", text)
    text = _REPEATING.sub(_repeating, _AND.sub(", ", without_blank_groups(text)))
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    text = _MIXED_NUMBER.sub(r"(\1+\2)", text)
    if not _ARGUMENTS.search(text):
        text = _BLANK.sub(", ", text)  # "5 1" is no product
    return _PLAIN_NAME.sub(r"\\\1 ", text)


def _fraction(vulgar: re.Match[str]) -> str:
    return " ".join(filter(None, (vulgar[0][:-1], unicodedata.normalize("NFKC", vulgar[0][-1])))).replace("⁄", "/")


def _repeating(decimal: re.Match[str]) -> str:
    whole, fixed, repeated = decimal[1], decimal[2], decimal[3] or decimal[4]
    over = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{over}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


def warm_up(metadata: dict[str, Any]) -> None:
    """Imports sympy and builds the grammar, which takes seconds."""
    # It warns in every process that its time-outs are off; here they are meant to be.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    expression("Answer: 2x", "x + x", metadata)
