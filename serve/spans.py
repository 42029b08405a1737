"""Where the predicates and roles that a parser wrote stand in the text that it was asked about."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from srl_rlvr import api

Place = tuple[int, int]  # characters of the text: start, end
_EDGE = r"(?:(?<!\w)|(?!\w))"  # anywhere but inside a word


def placed(frames: Sequence[Mapping[str, Any]], text: str) -> list[api.Frame]:
    """The frames with their places: as in the verifier, the n-th of a predicate is of its n-th occurrence; a role's
    span is the one nearest to it. None where the text has no such span."""
    times: Counter[str] = Counter()
    found: list[api.Frame] = []
    for frame in frames:
        predicate = frame["predicate"]
        at = dict(enumerate(places(predicate, text))).get(times[predicate])
        times[predicate] += 1
        spans = [
            (role, str(span))
            for role, value in frame.items()
            if role != "predicate"
            for span in (value if isinstance(value, list) else [value])
        ]
        roles = [api.Role(role=role, **_span(span, _nearest(places(span, text), at))) for role, span in spans]
        found.append(api.Frame(predicate=api.Span(**_span(predicate, at)), roles=roles))
    return found


def places(span: str, text: str) -> list[Place]:
    """Every occurrence as whole words, any white space for any. Where there is none, those inside words: PropBank
    takes "don't" for "do" and "n't"."""
    words = r"\s+".join(map(re.escape, span.split()))
    if not words:
        return []
    whole = [match.span() for match in re.finditer(_EDGE + words + _EDGE, text)]
    return whole or [match.span() for match in re.finditer(words, text)]


def _nearest(found: Sequence[Place], predicate: Place | None) -> Place | None:
    """The first where the predicate has no place."""
    if predicate is None:
        return next(iter(found), None)

    def distance(place: Place) -> float:
        between = max(place[0] - predicate[1], predicate[0] - place[1])
        return between if between >= 0 else math.inf  # the predicate itself is the last to be its own role

    return min(found, key=distance, default=None)


def _span(text: str, place: Place | None) -> dict[str, Any]:
    return {"text": text} | (dict(zip(("start", "end"), place, strict=True)) if place else {})
