"""Whole problems: finds the final answer in a solution and compares it with the right one.

A right answer earns 1, a wrong one 0; where there is no answer, or the token limit cut the solution off,
the outcome is `invalid` and the reward `metadata["invalid_reward"]`. Never runs what the policy wrote.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from srl_rlvr.verifiers.base import Score, graded, unanswered

CUT_OFF = "the solution did not end: the token limit cut it off"
NO_ANSWER = "no answer: neither 'Answer:' nor \\boxed{…} nor '#### …'"
LETTERS = ("A", "B", "C", "D", "E")

_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)
_ANSWER = re.compile(r"answer:", re.IGNORECASE)
_HASHES = re.compile(r"^\s*####(?!#)(.*)$", re.MULTILINE)

# A bound, so that a policy which writes digits for ever cannot make the verifier fail instead of itself.
_LONGEST_NUMBER = 200
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|(?<![A-Za-z])\.[0-9]+"
_FRACTION = re.compile(
    rf"(?P<sign>(?<![\w.])[-+]\s{{0,2}})?(?P<over>{_NUMBER})(?:[eE](?P<power>[-+]?[0-9]{{1,3}})(?!\w))?"
    rf"(?:\s?/\s?(?P<under>{_NUMBER}))?"
)
_AS_PLAIN = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-"})
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9])(?![0-9]))")
_NEGATED = re.compile(r"(?<![\w.)])-\s?\(([^-+()]*)\)")
_POWER = re.compile(r"(?<=[A-Za-z}])(?<![0-9.][eE])(?<![0-9]\})\^?[23]\b")
_NOT_OF_THE_NUMBER = re.compile(r"[$€£¥]|\\[,!;]|\\(?=[$%])|\\(?:left|right)(?![A-Za-z])|\*\*")
# What makes a number beside it a part of a formula. Letters that are units ("5m", "30s") are no variables.
_FUNCTION = r"(?:sqrt|cbrt|frac|exp|log|ln|lg|(?:arc)?(?:sin|cos|tan)|abs|pi|pm)"
_VARIABLE = r"(?![mgshdltpcLWVANJFC])[A-Za-z](?![A-Za-z])"
_FORMULA_BEFORE = re.compile(rf"(?:(?<![A-Za-z]){_FUNCTION}[\s({{\[]*|[A-Za-z]\(\s?|-\s?\(\s?|\w[*/^]\{{?|[√±]\s?)$")
_FORMULA_AFTER = re.compile(
    rf"[!²³]|[*/^]?\{{?{_VARIABLE}"
    rf"|\s?\*?\s?(?:\\(?:{_FUNCTION}|cdot|times)(?![A-Za-z])|{_FUNCTION}\(|pi(?![A-Za-z])|[π√])"
)

# A label's wrappings, what may lead to it, and what closes it off: without that, "A cat" would choose A.
_OPEN = r"(?:\\(?:text|math)[a-z]*\{|[\s$*(\['\"‘’“”])*"
_LEAD = rf"(?:(?:(?:the|correct|right|final)\s+)*(?:answer(?:\s+is)?|option|choice)\b:?{_OPEN})*"
_CLOSE = r"[\s$*}'\"‘’“”]*"
_SAID = r"(?<=\s)[-–—](?=\s)|(?<=\s)is\s+(?:the\s+)?(?:right|correct|answer)\b|$"


def exact(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """Equal to the reference, but for case, white space and a full stop at the end."""
    if metadata.get("finish_reason") == "length":
        return unanswered(metadata, CUT_OFF)
    answer = extract_answer(text)
    if answer is None:
        return unanswered(metadata, NO_ANSWER)
    return graded(_plain(answer) == _plain(reference), f"answered {answer!r}")


def numeric(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """The same number, exactly, or within `tolerance` (relative to the reference) where the metadata gives one.

    Without a marked answer the last number of the text stands for it. Raises ValueError where the
    reference is not a number.
    """
    right = read_number(reference)
    if right is None:
        raise ValueError(f"the reference {reference!r} is not a number")
    if metadata.get("finish_reason") == "length":
        return unanswered(metadata, CUT_OFF)
    answer = extract_answer(text)
    number = _last_number(without_thoughts(text)) if answer is None else read_number(answer)
    if answer is None and number is None:
        return unanswered(metadata, "no answer: not a number in the text")
    if number is None:
        return graded(False, f"answered {answer!r}: not one number")
    allowed = abs(right) * Fraction(metadata.get("tolerance", 0))
    return graded(abs(number - right) <= allowed, f"answered {answer or str(number)!r}")


def choice(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """The same label: a letter ("B", "(B)", "B) 12", but not "A, B"), or one of the metadata's `labels`.

    These may be words, such as True and False. Without `labels` a reference that is a letter is one of A to E, and
    any other stands for itself alone.
    """
    right = reference.strip().strip("().").strip()
    labels = metadata.get("labels") or (LETTERS if right.upper() in LETTERS else (right,))
    if metadata.get("finish_reason") == "length":
        return unanswered(metadata, CUT_OFF)
    answer = extract_answer(text)
    if answer is None:
        return unanswered(metadata, NO_ANSWER)
    label = _label(answer, labels)
    return graded(label is not None and label.casefold() == right.casefold(), f"answered {answer!r}")


def extract_answer(text: str) -> str | None:
    """The final answer of a whole solution, or None where nothing marks one.

    Outside the thoughts: what follows the last "Answer:" on its line (where that is empty: the lines up to
    the next blank one), else the last `\\boxed{…}`, else the last "#### …".
    """
    text = without_thoughts(text)
    marks = list(_ANSWER.finditer(text))
    if marks:
        answer = _line_or_paragraph(text[marks[-1].end() :])
        if answer:
            return _last_boxed(answer) or answer
    hashes = _HASHES.findall(text)
    return _last_boxed(text) or (hashes[-1].strip() if hashes else None) or None


def read_number(text: str) -> Fraction | None:
    """The one number that `text` holds, whatever words, currency or unit stand beside it; None for none or several.

    "50%" is 50: the sign is a unit. "2x", "5!" and "\\sqrt{9}" are formulas, not numbers. After a "=" only what follows
    the last one counts.
    """
    if len(text) > 4 * _LONGEST_NUMBER:
        return None
    text = _plain_numbers(text.rpartition("=")[2])
    matches = list(_FRACTION.finditer(text))
    return _fraction(matches[0]) if len(matches) == 1 and not _in_formula(text, matches[0]) else None


def _last_number(text: str) -> Fraction | None:
    matches = list(_FRACTION.finditer(_plain_numbers(text)))
    return _fraction(matches[-1]) if matches else None


def _plain_numbers(text: str) -> str:
    """The text with its numbers as `_FRACTION` reads them: no LaTeX, currency signs or powers of units ("cm^2")."""
    text = text.translate(_AS_PLAIN).replace("{,}", ",")
    text = _LATEX_FRACTION.sub(r" \1\2/\3\4", text)  # the space keeps the 2 of "2\frac12" out
    unpowered = _POWER.sub("", text)
    text = unpowered if _FRACTION.search(unpowered) else text  # the 3 of "Rs3" is the number
    return _NEGATED.sub(r"-\1", _NOT_OF_THE_NUMBER.sub("", text))


def _in_formula(text: str, number: re.Match[str]) -> bool:
    return bool(_FORMULA_BEFORE.search(text[: number.start()]) or _FORMULA_AFTER.match(text, number.end()))


def _fraction(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _LONGEST_NUMBER:
        return None
    value = Fraction(match["over"].replace(",", "")) * Fraction(10) ** int(match["power"] or 0)
    if match["under"]:
        under = Fraction(match["under"].replace(",", ""))
        if not under:
            return None
        value /= under
    return -value if (match["sign"] or "").startswith("-") else value


def without_thoughts(text: str) -> str:
    """What stands outside <think> and </think>."""
    text = _THINK.sub("", text)
    return text.rpartition("</think>")[2].partition("<think>")[0]  # tags without a partner


def _line_or_paragraph(text: str) -> str:
    line, _, rest = text.partition("\n")
    if line := _unmarked(line):
        return line
    return _unmarked(re.split(r"\n[ \t]*\n", rest.strip("\n"), maxsplit=1)[0])


def _unmarked(text: str) -> str:
    return text.strip().removeprefix("**").removesuffix("**").strip()


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if not depth:
            return text[start:position].strip() or None
    return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _label(answer: str, labels: list[str] | tuple[str, ...]) -> str | None:
    if all(len(label) == 1 for label in labels):
        return _letter(answer, "".join(labels))
    named = [label for label in labels if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", answer, re.I)]
    # "Not True" beside "True": the longest label that holds all the others is the one that was meant.
    longest = max(named, key=len, default="")
    return longest if longest and all(label.casefold() in longest.casefold() for label in named) else None


def _letter(answer: str, letters: str) -> str | None:
    """The letter that the answer starts with, None where another one is named after it."""
    found = re.match(rf"{_OPEN}{_LEAD}([{re.escape(letters)}]){_CLOSE}(?:[).:,;\]]|{_SAID})", answer, re.IGNORECASE)
    if not found:
        return None
    # Only letters of the same case: the "a." of "B) 10 a.m." is no label; nor is the A:C of "B) A:C = 2:3".
    letters = letters.upper() if found[1].isupper() else letters.lower()
    label = rf"(?<![\w'’])(?<!\w\()([{re.escape(letters)}]){_CLOSE}(?:[)\];]|[.:,](?!\w)|{_SAID})"
    return found[1] if set(re.findall(label, answer[found.end(1) :])) <= {found[1]} else None
