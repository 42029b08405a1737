"""What an ordering of candidates is worth. The text is their numbers, best first; the reference is JSON: the gain of
each candidate that has one, `{"3": 1, "7": 2}`.

Metadata of all: `relevant`, the gains of everything relevant, also of what is no candidate (default: the reference's).
"""

from __future__ import annotations

import json
import math
from typing import Any

from srl_rlvr.verifiers.base import SCORED, Score

CUTOFF = 10


def pick(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """SRL's reward of one position: the gain of the pick relative to the best of those left. `taken` in the metadata
    are the expert's picks before it."""
    gains = _gains(reference)
    taken = set(metadata.get("taken", ()))
    best = max((gain for candidate, gain in gains.items() if candidate not in taken), default=0.0)
    [picked] = _ordering(text)[:1]
    reward = gains.get(picked, 0.0) / best if best else 1.0
    return Score(SCORED, reward, {"gain": reward})


def ndcg(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """nDCG@10 (Järvelin and Kekäläinen 2002, with the gains as they are)."""
    gains = _gains(reference)
    found = _discounted([gains.get(candidate, 0.0) for candidate in _ordering(text)[:CUTOFF]])
    ideal = _discounted(sorted(metadata.get("relevant") or gains.values(), reverse=True)[:CUTOFF])
    reward = found / ideal if ideal else 0.0
    return Score(SCORED, reward, {f"ndcg@{CUTOFF}": reward, f"mrr@{CUTOFF}": _reciprocal_rank(text, gains)})


def reciprocal_rank(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """1 / the rank of the first candidate with a gain; 0 where none is among the first ten."""
    reward = _reciprocal_rank(text, _gains(reference))
    return Score(SCORED, reward, {f"mrr@{CUTOFF}": reward})


def label(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """1 for the right label. Another costs what `costs` in the metadata says of it (by number; default 0)."""
    gains = _gains(reference)
    [picked] = _ordering(text)[:1]
    right = gains.get(picked, 0.0) > 0
    reward = 1.0 if right else -float(metadata.get("costs", {}).get(str(picked), 0.0))
    return Score(SCORED, reward, {"accuracy": float(right)})


def _gains(reference: str) -> dict[int, float]:
    return {int(candidate): float(gain) for candidate, gain in json.loads(reference).items()}


def _ordering(text: str) -> list[int]:
    return [int(number) for number in text.split()]


def _discounted(gains: list[float]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))


def _reciprocal_rank(text: str, gains: dict[int, float]) -> float:
    ranks = (rank for rank, candidate in enumerate(_ordering(text)[:CUTOFF], start=1) if gains.get(candidate, 0.0) > 0)
    return 1.0 / next(ranks, math.inf)
