"""Whole problems: finds the final answer in a solution and compares it with the right one.

A right answer earns 1, a wrong one 0; where there is no answer, or the token limit cut the solution off,
the outcome is `invalid` and the reward `metadata["invalid_reward"]`. Never runs what the policy wrote.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from srl_rlvr.verifiers import units
from srl_rlvr.verifiers.base import Score, graded, unanswered

CUT_OFF = "the solution did not end: the token limit cut it off"
NO_ANSWER = "no answer: neither 'Answer:' nor \\boxed{…} nor '#### …'"
LETTERS = ("A", "B", "C", "D", "E")

_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)
_ANSWER = re.compile(r"answer:", re.IGNORECASE)
_HASHES = re.compile(r"^\s*####(?!#)(.*)$", re.MULTILINE)

# A bound, so that a policy which writes digits for ever cannot make the verifier fail instead of itself.
_LONGEST_NUMBER = 200
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3})(?![0-9])|[0-9]+"  # 1,234,567 or 12,34,567
_NUMBER = rf"(?:{_DIGITS})(?:\.[0-9]*)?|(?<![A-Za-z])\.[0-9]+"
PLAIN_NUMBER = re.compile(r"[-+]?(([0-9]{1,3}(,[0-9]{3})+|[0-9]+)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
_FRACTION = re.compile(
    rf"(?P<sign>(?<![\w.])[-+]\s{{0,2}})?(?P<over>{_NUMBER})(?:[eE](?P<power>[-+]?[0-9]{{1,3}})(?!\w))?"
    rf"(?:\s?/\s?(?P<under>{_NUMBER}))?"
)
_AS_PLAIN = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-"})
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_POWER_OF_TEN = (
    r"10\s*(?:(?:\^|\*\*)\s*(?:\{\s*([-+]?[0-9]{1,3})\s*\}|([-+]?[0-9]{1,3})(?![0-9]))|([⁻⁺]?[⁰¹²³⁴-⁹]{1,3}))"
)
_SCIENTIFIC = re.compile(rf"(?<=[0-9.])\s*(?:\\times|\\cdot|[×x*·⋅])\s*{_POWER_OF_TEN}")
_ONE_TO_A_POWER = re.compile(rf"(?<![\w.^){{}}\]]){_POWER_OF_TEN}")
_VULGAR = re.compile(r"([0-9]?)([¼-¾⅐-⅞↉])")
# Thousands set apart by thin spaces, apostrophes or underscores, or by dots where a comma ends the whole part.
_THIN_GROUPS = re.compile(
    r"(?<![\w.,])[0-9]{1,3}(?:(?:[\u00a0\u2009\u202f][0-9]{3})+|(?:['’][0-9]{3})+|(?:_[0-9]{3})+)(?!\w)"
)
_BLANK_GROUPS = re.compile(r"(?<![\w.,/^])[0-9]{1,3}(?: [0-9]{3})+(?![\w/]|,[0-9])")
_BLANK_GROUPS_COMMA = re.compile(r"(?<![\w.,/^])([0-9]{1,3}(?: [0-9]{3})+),([0-9]{1,2})(?![\w,/])")
_DOT_GROUPS = re.compile(r"(?<![\w.,])([0-9]{1,3}(?:\.[0-9]{3})+),([0-9]+)(?![\w,]|\.[0-9])")
_MIXED_NUMBER = re.compile(r"(?<![\w.,/^])([0-9]{1,9})\s+([0-9]{1,9})\s?/\s?([1-9][0-9]{0,8})(?![\w/]|\.[0-9])")
_MINUS_WORD = re.compile(r"\b(?:minus|negative)\s+(?=[0-9.$€£])", re.IGNORECASE)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"\s?({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
_CURRENCY = re.compile(r"\\\$|[€£¥₹¢]|(?<!\\)\$")
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


@dataclass(frozen=True)
class Quantity:
    """The one number of a text."""

    value: Fraction
    units: list[str]  # and other words: a currency, and what follows the number
    before: str
    after: str


def exact(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """Equal to the reference, but for case, white space, a full stop at the end, and LaTeX that only sets text.

    The time of day may be written either way: "21:30" or "9:30 pm".
    """
    if metadata.get("finish_reason") == "length":
        return unanswered(metadata, CUT_OFF)
    answer = extract_answer(text)
    if answer is None:
        return unanswered(metadata, NO_ANSWER)
    return graded(same_text(answer, reference), f"answered {answer!r}")


def same_text(one: str, other: str) -> bool:
    """Whether two answers are the same as `exact` sees them."""
    one, other = _plain(one), _plain(other)
    return one == other or (time_of_day(one) or "") == (time_of_day(other) or "no time")


def numeric(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """The same number, exactly, or within `tolerance` (relative to the reference) where the metadata gives one.

    The answer may leave out the reference's unit, but not name another one; 50% may be written as 50 or 0.5.
    Without a marked answer the last number of the text stands for it. Raises ValueError where the
    reference is not a number.
    """
    right = read_quantity(reference)
    if right is None:
        raise ValueError(f"the reference {reference!r} is not a number")
    if metadata.get("finish_reason") == "length":
        return unanswered(metadata, CUT_OFF)
    answer = extract_answer(text)
    if answer is None:
        number = _last_number(without_thoughts(text))
        if number is None:
            return unanswered(metadata, "no answer: not a number in the text")
        found = Quantity(number, [], "", "")
    else:
        found = read_quantity(answer)
    if found is None:
        return graded(False, f"answered {answer!r}: not one number")
    if not units.same(right.units, found.units):
        return graded(False, f"answered {answer!r}: not in {right.units[0]}")
    allowed = abs(right.value) * Fraction(metadata.get("tolerance", 0))
    is_right = any(abs(number - right.value) <= allowed for number in _values(found, right))
    return graded(is_right, f"answered {answer or str(found.value)!r}")


def _values(found: Quantity, right: Quantity) -> list[Fraction]:
    """The answer's value in the reference's unit: with or without a percent sign."""
    percent = [bool(of.units) and of.units[0] == "%" for of in (found, right)]
    if percent[0] and not right.units:
        return [found.value, found.value / 100]
    if percent[1] and not found.units:
        return [found.value, found.value * 100]
    return [found.value]


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
    found = read_quantity(text)
    return found.value if found else None


def read_quantity(text: str) -> Quantity | None:
    """The one number that `text` holds, as `read_number` reads it, with the units beside it."""
    if len(text) > 4 * _LONGEST_NUMBER:
        return None
    text = text.rpartition("=")[2].strip()
    if PLAIN_NUMBER.fullmatch(text) and len(text) <= _LONGEST_NUMBER:
        return Quantity(Fraction(text.replace(",", "")), [], "", "")
    found = _CURRENCY.findall(text)
    dollars = found.count("$") % 2  # an even number of them encloses a formula
    currency = [sign.lstrip("\\") for sign in found if sign != "$"] or ["$"] * dollars
    text = without_blank_groups(_MINUS_WORD.sub("-", text))
    text = _plain_numbers(_MIXED_NUMBER.sub(_improper, _with_plain_fractions(text)))
    matches = list(_FRACTION.finditer(text))
    if len(matches) != 1 or _in_formula(text, matches[0]):
        return None
    value, end = _scaled(matches[0], text)
    if value is None:
        return None
    after = text[end:]
    return Quantity(value, [*currency[:1], *units.units_of(after)], text[: matches[0].start()], after)


def without_blank_groups(text: str) -> str:
    """`2 500 000` as `2500000`, and `2 500,50`, as some countries write it, as `2500.50`."""
    text = _BLANK_GROUPS_COMMA.sub(lambda group: f"{group[1].replace(' ', '')}.{group[2]}", text)
    return _BLANK_GROUPS.sub(lambda group: group[0].replace(" ", ""), text)


def _last_number(text: str) -> Fraction | None:
    text = _plain_numbers(_with_plain_fractions(text))
    matches = list(_FRACTION.finditer(text))
    return _scaled(matches[-1], text)[0] if matches else None


def _scaled(match: re.Match[str], text: str) -> tuple[Fraction | None, int]:
    """The number with the word for a power of ten after it ("3 million"), and where they end."""
    value, scale = _fraction(match), _SCALE.match(text, match.end())
    if value is None or scale is None:
        return value, match.end()
    return value * 10 ** _SCALES[scale[1].lower()], scale.end()


def _with_plain_fractions(text: str) -> str:
    """`3½` as `3 1/2`."""
    return _VULGAR.sub(lambda found: f"{found[1]} {unicodedata.normalize('NFKC', found[2])}".replace("⁄", "/"), text)


def _improper(mixed: re.Match[str]) -> str:
    whole, over, under = map(int, mixed.groups())
    return f"{whole * under + over}/{under}"


def _to_a_power(found: re.Match[str]) -> str:
    return f"e{(found[1] or found[2] or found[3]).translate(_SUPERSCRIPTS)}"


def _plain_numbers(text: str) -> str:
    """The text with its numbers as `_FRACTION` reads them: no LaTeX, currency signs or powers of units ("cm^2")."""
    text = text.translate(_AS_PLAIN).replace("{,}", ",")
    text = _THIN_GROUPS.sub(lambda group: re.sub(r"\D", "", group[0]), text)
    text = _DOT_GROUPS.sub(lambda group: f"{group[1].replace('.', '')}.{group[2]}", text)
    if "10" in text:
        text = _ONE_TO_A_POWER.sub(lambda found: f"1{_to_a_power(found)}", _SCIENTIFIC.sub(_to_a_power, text))
    text = _LATEX_FRACTION.sub(r" \1\2/\3\4", text)  # the space keeps the 2 of "2\frac12" out
    unpowered = _POWER.sub(lambda power: "²³"[int(power[0][-1]) - 2], text)
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


_QUOTES = str.maketrans("‘’“”\u2212\u2013", "''\"\"--")
_SET_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"\\[,;:! ]|~")
_SUBSCRIPTS = re.compile("[₀-₉]+")
_DELIMITED = re.compile(r"\$\$?(?P<a>[^$]+)\$\$?|\\\((?P<b>.+)\\\)|\\\[(?P<c>.+)\\\]", re.DOTALL)
_DEEPEST = 8  # wrappings, one in another
_TIME = re.compile(r"([0-9]{1,2})(?::([0-5][0-9]))?(?::([0-5][0-9]))?(?:\s*([ap])\.?\s?m\b\.?)?")


def unwrapped(text: str) -> str:
    """The text without what only sets it: bold face, `$ … $`, `\\( … \\)`, `\\boxed{…}`."""
    before = ""
    for _ in range(_DEEPEST):
        if text == before:
            break
        before, text = text, _unmarked(text)
        if found := _DELIMITED.fullmatch(text):
            text = (found["a"] or found["b"] or found["c"]).strip()
        if text.startswith("\\boxed{") and text.endswith("}") and (inner := _last_boxed(text)):
            text = inner if len(inner) >= len(text) - len("\\boxed{}") - 2 else text
    return text


def _plain(text: str) -> str:
    text = unwrapped(unicodedata.normalize("NFC", text))
    text = _SET_TEXT.sub(r"\1", _SPACES.sub(" ", text)).translate(_QUOTES)
    text = re.sub(r"\\([$%&#_{}])", r"\1", text)
    text = _SUBSCRIPTS.sub(lambda digits: f"_{unicodedata.normalize('NFKC', digits[0])}", text)
    text = re.sub(r"_\{(\w+)\}", r"_\1", text)
    text = re.sub(r"(?<=[A-Za-z)])_(?=[0-9])", "", text)  # CO_2, but not 4210_5
    text = " ".join(text.casefold().split()).removesuffix(".").rstrip()
    text = re.sub(r"(?<=[0-9])\s*([-:/])\s*(?=[0-9])", r"\1", text)  # 3 - 1
    return re.sub(r"^\((\w)\)$", r"\1", text)


def time_of_day(text: str) -> tuple[int, int, int] | None:
    """(hour, minute, second) of a time that has minutes or is marked a.m. or p.m., else None."""
    found = _TIME.fullmatch(text.strip().casefold())
    if not found or not (found[2] or found[4]):
        return None
    hour, half = int(found[1]), found[4]
    if hour > (12 if half else 24) or (half and not hour):
        return None
    hour = hour % 12 + 12 * (half == "p") if half else hour
    return hour, int(found[2] or 0), int(found[3] or 0)


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
