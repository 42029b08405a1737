"""What a verifier returns. Knows nothing of samples, policies or processes, and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# The same words as in `records`, which is not imported: pyarrow would double a worker's start-up time.
SCORED, INVALID = "scored", "invalid"


@dataclass(frozen=True, slots=True)
class Score:
    """What one text is worth.

    `invalid` means that the policy's output is wrong in form and earns its penalty. A verifier that
    cannot do its work raises: the pool turns that into `failed`, which no verifier returns itself.
    """

    outcome: str
    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""


Verifier = Callable[[str, str, dict[str, Any]], Score]
"""(text, reference, metadata) → Score. The pool adds the rollout's `finish_reason` to the metadata."""


def graded(right: bool, detail: str = "") -> Score:
    """The whole-problem rule: a right answer earns 1, a wrong one 0."""
    return Score(SCORED, float(right), {"correct": float(right)}, detail)


def unanswered(metadata: Mapping[str, Any], detail: str) -> Score:
    """No answer to judge: `invalid`, at the stage's price (`invalid_reward`, 0 where it names none)."""
    return Score(INVALID, float(metadata.get("invalid_reward", 0.0)), {"correct": 0.0}, detail)
