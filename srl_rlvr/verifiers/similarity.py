"""SRL's step reward: how close the policy's action comes to the expert's (arXiv 2510.25992, eq. 3).

Only the action is compared; the monologue before it is free. Knows the form of one step's text and
nothing of the problem that it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from srl_rlvr.errors import InputError, MissingExtraError
from srl_rlvr.verifiers.base import INVALID, SCORED, Score

OPEN, CLOSE = "<think>", "</think>"
BROKEN_FORMAT_REWARD = -1.0

_TOKEN = re.compile(r"\w+|\W")


def similarity(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """r(a, s) = 2·M / (|a| + |s|) in [0, 1]; -1 and `invalid` where the output breaks the format.

    Metadata: `think` (default False) is whether `<think>…</think>` comes before the action;
    `finish_reason`; `measure` is one of `MEASURES`, "characters" unless given.
    """
    measure_name = metadata.get("measure", "characters")
    if measure_name not in MEASURES:
        raise InputError(f"similarity: measure '{measure_name}' is unknown; there are {', '.join(MEASURES)}")
    if metadata.get("finish_reason") == "length":
        return _broken("the action did not end: the token limit cut it off")
    action, fault = _action(text, bool(metadata.get("think", False)))
    if fault:
        return _broken(fault)
    ratio = MEASURES[measure_name](action, reference)
    return Score(SCORED, ratio, {"similarity": ratio})


def _broken(detail: str) -> Score:
    return Score(INVALID, BROKEN_FORMAT_REWARD, {"format": BROKEN_FORMAT_REWARD}, detail)


def _action(text: str, think: bool) -> tuple[str, str]:
    """The action and "", or "" and what is wrong with the form. The action keeps its line break at the end.

    An action of several lines may have a thought before each: what stands between thoughts is the action.
    """
    if not think:
        if OPEN in text or CLOSE in text:
            return "", "a think tag where only an action was asked for"
        return (text, "") if text.strip() else ("", "the action is empty")
    before, *thoughts = text.split(OPEN)
    if not thoughts or before.strip():
        return "", f"text before {OPEN}" if thoughts else f"no {OPEN}"
    parts = [thought.split(CLOSE) for thought in thoughts]
    if any(len(part) != 2 for part in parts):
        return "", f"an {OPEN} without its own {CLOSE}"
    actions = [action.lstrip() for _, action in parts]
    if not all(map(str.strip, actions)):
        return "", "a thought without an action"
    if not all(action.endswith("\n") for action in actions[:-1]):
        return "", "a thought within a line"
    return "".join(actions), ""


def _ratio(action: Any, expert: Any) -> float:
    import cydifflib

    # autojunk takes frequent characters for junk beyond 200: off, by the definition of the reward.
    # The matching blocks depend on the order of the arguments: the action comes first.
    return cydifflib.SequenceMatcher(None, action, expert, autojunk=False).ratio()  # type: ignore[attr-defined]


def _words(action: str, expert: str) -> float:
    return _ratio(action.split(), expert.split())


def _tokens(action: str, expert: str) -> float:
    return _ratio(_TOKEN.findall(action), _TOKEN.findall(expert))


def _lcs(action: str, expert: str) -> float:
    try:
        from rapidfuzz.distance import Indel
    except ImportError:
        raise MissingExtraError("rapidfuzz", "similarity") from None
    return Indel.normalized_similarity(action, expert)


MEASURES: dict[str, Callable[[str, str], float]] = {
    "characters": _ratio,
    "words": _words,
    "tokens": _tokens,
    "lcs": _lcs,  # 2·LCS / (|a| + |s|): never below "characters"
}


def warm_up(metadata: dict[str, Any]) -> None:
    """Imports what the measure needs."""
    MEASURES.get(metadata.get("measure", "characters"), _ratio)("a", "a")
