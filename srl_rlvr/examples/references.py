"""Which verifier a right answer calls for, by its form, and whether the answer meets it.

    12, 1,234.5, 2 500 000, 12 km, $18, 3 × 10^8     `numeric`: one number, alone or with a unit
    \\frac{1}{2}, x^2 + 1, 1/2, (3, 4], 3 and -3       `expression`: LaTeX, or numbers and single letters with operators
    everything else                                  `exact`: words, dates, times, codes, ratios, scores

It must not know files or rows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from srl_rlvr import records
from srl_rlvr.verifiers import VERIFIERS
from srl_rlvr.verifiers.answers import PLAIN_NUMBER, read_quantity, time_of_day, unwrapped
from srl_rlvr.verifiers.expressions import WORK_OUT
from srl_rlvr.verifiers.pool import VerifierPool
from srl_rlvr.verifiers.units import is_known

DEADLINE_S = 5.0  # of one check; a reference that takes longer would time out at every verification, too
_WORKERS = 4
_QUICK = ("exact", "numeric", "choice")  # which always end, soon

_MATHEMATICS = re.compile(  # commands of LaTeX
    r"[dtc]?frac|sqrt|[dt]?binom|cdot|times|div|pm|mp|le|leq|leqslant|ge|geq|geqslant|ne|neq|lt|gt|approx|equiv|sim|infty"
    r"|cup|cap|in|notin|subset|subseteq|setminus|emptyset|varnothing|left|right|begin|end|overline|bar|dot|hat|vec"
    r"|log|ln|exp|(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|det|gcd|max|min|deg|mathbb|mathcal|lfloor|rfloor|lceil|rceil"
    r"|[lc]?dots|circ|angle|triangle|sum|prod|int|lim|to|[pb]?mod|mid|[lr]?vert|quad|text|mathrm|textbf|mbox|prime"
    r"|pi|theta|[aA]lpha|beta|[gG]amma|[dD]elta|(?:var)?epsilon|[lL]ambda|mu|nu|rho|[sS]igma|tau|(?:var)?[pP]hi|[pP]si"
    r"|[oO]mega|[tT]heta|forall|exists|land|lor"
)
_NAMES = re.compile(  # in plain formulas
    r"(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|lg|exp|sqrt|abs|floor|ceil|max|min|gcd|lcm|mod|inf|infinity|pi"
    r"|alpha|beta|gamma|delta|epsilon|theta|lambda|rho|sigma|tau|phi|psi|omega|mu|nu"
)
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_LETTERS = re.compile(r"(?:(?![²³¹⁰⁴-⁹₀-₉¼-¾⅐-⅞])[^\W\d_])+")
_DIGITS_APART = re.compile(r"[0-9](?:\s?[-\u2013:]\s?|\s[/.]\s)[0-9]")
_CODES = (
    re.compile(r"[0-9]+(?:\s?[-\u2013./:]\s?[0-9]+){2,}"),  # dates, versions, addresses, ISBN
    re.compile(r"(?:0[0-9]*/[0-9]+|[0-9]+/0[0-9]*)"),  # 05/06
    re.compile(r"[A-Z]{1,3}-?[0-9]+"),  # A1, F-16
    re.compile(r"[0-9]+-[A-Z]"),
)
_DIGITS_ONLY = re.compile(r"[-+\u2013()\s./:0-9]+")
_ELEMENT = re.compile(r"[A-Z][0-9]")  # H2, as in formulas of chemistry
_OPERAND_BEFORE, _OPERAND_AFTER = r"[\w)\]}!]", r"[\w(\[{√\\]"
_SIGN = r"\s*(?:\*\*|[-+*/^=<>≤≥≠·×÷]|\\[a-z]+)\s*[-+±]?"
_OPERATION = re.compile(
    rf"(?!(?<=[0-9])\s?[-\u2013]\s?[0-9])(?<={_OPERAND_BEFORE}){_SIGN}(?={_OPERAND_AFTER})"
    r"|[±√]\s?[\w(]|[0-9a-z)]!(?!\w)|(?<![A-Za-z0-9])[0-9]+(?:[a-ceijknp-rtuvw-z]|π)(?![A-Za-z0-9])|[0-9a-z)][²³⁰-⁹]|[¼-¾⅐-⅞]"
)
_VARIABLES = re.compile(r"[abcdfghkmnpqrstuvwxyz]{2}|[abc]{3}|[xyz]{3}")  # of a product, if they are no unit
_LONE_VARIABLES = re.compile(r"[xyz]{2}|[-+]?[πθ∞∅]|pi|infinity")
_LIST = re.compile(r"[0-9]\s*\}?\s*,|,\s*[-+]?[0-9]")
_AND = re.compile(r"\s*,?\s*\b(?:and|or)\b\s*|\s*,\s*")
_CONJUNCTION = re.compile(r"\b(?:and|or)\b")
_APPROXIMATELY = re.compile(r"(?:≈|~|\\approx)\s*")
_GLUED_CODE = re.compile(r"[0-9](?![VWNJKLC]\b)[A-Z]\b")  # 10B may be a seat; 12V are volts
_BEFORE = re.compile(r"(?:us|rs\.?|usd|eur|gbp|inr|cny|jpy)?\s*", re.IGNORECASE)


def reference_of(answer: str | int | float) -> tuple[str, str]:
    """Return (reference, verifier) of a right answer. Raises ValueError if it is empty."""
    text = str(answer).strip()
    if not text:
        raise ValueError("column 'answer' is empty")
    plain = _APPROXIMATELY.sub("", unwrapped(text), count=1).translate({0x2212: "-"})
    if PLAIN_NUMBER.fullmatch(plain):
        return plain.replace(",", ""), "numeric"
    if _is_code(plain):
        return text, "exact"
    if _is_quantity(plain):
        return text, "numeric"
    return text, "expression" if _is_formula(plain) else "exact"


def _is_code(text: str) -> bool:
    """Whether it is a date, a time, a score, a telephone number or the like: digits that are no number."""
    if time_of_day(text) or any(code.fullmatch(text) for code in _CODES):
        return True
    return bool(_DIGITS_ONLY.fullmatch(text) and _DIGITS_APART.search(text))


def _is_quantity(text: str) -> bool:
    """Whether it is one number, alone or with units that are known."""
    found = read_quantity(text)
    if found is None or "=" in text or _GLUED_CODE.search(text) or not _BEFORE.fullmatch(found.before.strip()):
        return False
    if not found.units:
        is_fraction = "/" in text or "frac" in text or not text.isascii() and not set(text).isdisjoint("½⅓⅔¼¾⅕⅛")
        return not is_fraction and not found.after.strip(" .{}()*\\")
    return all(map(is_known, found.units)) and not re.search(r"[0-9]", found.after.replace("^2", "").replace("^3", ""))


def _is_formula(text: str) -> bool:
    commands = _COMMAND.findall(text)
    if commands:
        return any(map(_MATHEMATICS.fullmatch, commands))
    if _CONJUNCTION.search(text):
        parts = [part for part in _AND.split(text) if part]
        return len(parts) > 1 and all(PLAIN_NUMBER.fullmatch(part) or _is_formula(part) for part in parts)
    if _ELEMENT.search(text) or re.fullmatch(r"[A-Z]\s?[-/]\s?[A-Z]", text):
        return False
    words = [word for word in _LETTERS.findall(text) if len(word) > 1 and not _NAMES.fullmatch(word)]
    if any(not _VARIABLES.fullmatch(word) or is_known(word) for word in words):
        return False
    return bool(_OPERATION.search(text) or _LIST.search(text) or _LONE_VARIABLES.fullmatch(text) or _is_call(text))


def _is_call(text: str) -> bool:
    """Whether a function or a constant stands beside a number, a variable or a parenthesis: "ln 2", "2pi"."""
    return any(map(_NAMES.fullmatch, _LETTERS.findall(text))) and bool(re.search(r"[0-9(]|\b[a-z]\b", text))


def fault(reference: str, verifier: str, metadata: Mapping[str, Any]) -> str:
    """Return "" or why not even `Answer: <reference>` earns the reward. Checks the verifiers that always end."""
    if verifier not in _QUICK or (verifier == "numeric" and PLAIN_NUMBER.fullmatch(reference)):
        return ""
    text = f"Answer: {reference}"
    try:
        score = VERIFIERS[verifier](text, reference, dict(metadata))
    except (ArithmeticError, ValueError) as error:
        return f"verifier '{verifier}' cannot judge any answer: {error}"
    return "" if score.reward == 1 else _never_right(text, verifier)


def slow_faults(examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """As `fault`, of Examples that `expression` verifies, in processes that can be killed; "" for all others."""
    asked = [example["reference"] if example["verifier"] == "expression" else None for example in examples]
    new = list(dict.fromkeys(reference for reference in asked if reference is not None and reference not in _known))
    if new:
        _known.update(zip(new, _worked_out(new), strict=True))
    return ["" if reference is None else _known[reference] for reference in asked]


_known: dict[str, str] = {}  # faults of references, so that each is worked out once in a process


def _worked_out(references: Sequence[str]) -> list[str]:
    prompts, rollouts = [], []
    for number, reference in enumerate(references):
        prompt: dict[str, Any] = {"id": str(number), "example_id": str(number), "stage": "", "step_index": -1}
        prompt |= {"token_ids": [], "trunk_id": "", "offset": 0, "verifier": "expression", "reference": reference}
        prompts.append(prompt | {"metadata": json.dumps({WORK_OUT: True})})
        rollout: dict[str, Any] = {"prompt_id": str(number), "sample_index": 0, "policy_version": 0, "token_ids": []}
        rollouts.append(rollout | {"logprobs": [], "text": f"Answer: {reference}", "finish_reason": "stop"})
    with VerifierPool(min(_WORKERS, os.cpu_count() or 1), DEADLINE_S) as pool:
        verdicts = pool.score(records.build("Prompt", prompts), records.build("Rollout", rollouts)).to_pylist()
    return [
        f"verifier 'expression' cannot judge any answer: {verdict['detail']}"
        if verdict["outcome"] == records.FAILED
        else "" if verdict["reward"] == 1 else _never_right(f"Answer: {reference}", "expression")
        for reference, verdict in zip(references, verdicts, strict=True)
    ]  # fmt: skip


def _never_right(text: str, verifier: str) -> str:
    shown = f"{text[:60]}…" if len(text) > 60 else text
    return (f"no answer can be right: verifier '{verifier}' does not accept {shown!r}; an answer is one line, and a "
            "'verifier' column may name another verifier")  # fmt: skip
