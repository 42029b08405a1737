"""LaTeX and formulas: equal where math-verify finds them equal. Never runs what the policy wrote."""

from __future__ import annotations

import logging
import re
from typing import Any

from srl_rlvr.verifiers.answers import CUT_OFF, NO_ANSWER, extract_answer
from srl_rlvr.verifiers.base import Score, graded, unanswered

_MIXED_NUMBER = re.compile(r"(?<![\w.,^])([0-9]+)\s+([0-9]+/[0-9]+)(?![\w./])")
_PLAIN_NAME = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|ln|log|exp)(?![A-Za-z])")


def expression(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """1 where the final answer is mathematically equal to the reference, which may be LaTeX or plain ("x**2 + 1").

    Raises ValueError where the reference is not an expression. May run for ever: needs the pool's deadline.
    """
    right = _parsed(reference)
    if not right:
        raise ValueError(f"the reference {reference!r} is not an expression")
    if metadata.get("finish_reason") == "length":
        return unanswered(metadata, CUT_OFF)
    answer = extract_answer(text)
    if answer is None:
        return unanswered(metadata, NO_ANSWER)
    found = _parsed(answer)
    if not found:
        return graded(False, f"answered {answer!r}: not an expression")
    import math_verify

    # The time-out is a signal.alarm, which fails off the main thread and scores 0: the pool kills instead.
    return graded(math_verify.verify(right, found, timeout_seconds=None), f"answered {answer!r}")


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
    """Plain mathematics as LaTeX that is read alike: "1 1/2" is a sum, pi is not p times i."""
    text = text.strip().strip("$").replace("**", "^")
    return _PLAIN_NAME.sub(r"\\\1 ", _MIXED_NUMBER.sub(r"(\1+\2)", text))


def warm_up(metadata: dict[str, Any]) -> None:
    """Imports sympy and builds the grammar, which takes seconds."""
    # It warns in every process that its time-outs are off; here they are meant to be.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    expression("Answer: 2x", "x + x", metadata)
