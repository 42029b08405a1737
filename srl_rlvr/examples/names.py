"""The end of an error message about a name: the nearest one that exists, else those that exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LISTED_AT_MOST = 20


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'sums'?`, or nothing where no known name is near."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """As `did_you_mean`, with the known names themselves where none is near."""
    names = sorted(known)
    more = ", …" if len(names) > LISTED_AT_MOST else ""
    return did_you_mean(name, names) or f"; there is {', '.join(names[:LISTED_AT_MOST]) or 'nothing'}{more}"
