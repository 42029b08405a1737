"""Generated problems: right where the scorer of their own reasoning-gym family gives full marks.

The scorers' part marks are not used: they pay for garbage, and by default for short answers. Families
whose scorer cannot be trusted with a policy's text are refused.
"""

from __future__ import annotations

import difflib
import functools
import json
from typing import Any

from srl_rlvr.errors import InputError, MissingExtraError
from srl_rlvr.verifiers.answers import CUT_OFF, NO_ANSWER, extract_answer
from srl_rlvr.verifiers.base import Score, graded, unanswered

_RUNS_CODE = "its scorer runs the answer as code"
REFUSED = {
    "binary_matrix": _RUNS_CODE,
    "n_queens": _RUNS_CODE,
    "spiral_matrix": _RUNS_CODE,
    "string_insertion": _RUNS_CODE,
    "countdown": _RUNS_CODE,
    "puzzle24": _RUNS_CODE,
    "polynomial_multiplication": _RUNS_CODE,
    "simple_integration": _RUNS_CODE,
    "intermediate_integration": _RUNS_CODE,
    "game_of_life_halting": "its scorer gives full marks to any text",
    "coin_flip": "its scorer gives full marks to the first digit of the answer",
}

# What the scorers raise on prose, where they expect a number, a list or an object.
_RAISED_ON_PROSE = (ValueError, TypeError, IndexError, KeyError)


def reasoning_gym(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """1 where the family's `score_answer` gives 1 or more to the final answer, else 0.

    Metadata: `dataset` is the family, `entry` the generated item, `config` (optional) what the family was
    configured with. An answer that the scorer raises on is `invalid`. Raises InputError for a refused or
    unknown family, RuntimeError where the scorer gives the entry's own answer less than full marks.
    """
    family, entry = metadata["dataset"], metadata["entry"]
    scorer = _scorer(family, json.dumps(metadata.get("config", {}), sort_keys=True))
    if metadata.get("finish_reason") == "length":
        return unanswered(metadata, CUT_OFF)
    answer = extract_answer(text)
    if answer is None:
        return unanswered(metadata, NO_ANSWER)
    try:
        right = scorer.score_answer(answer, entry) >= 1
    except _RAISED_ON_PROSE as error:
        _check_own_answer(scorer, entry, family)
        return unanswered(metadata, f"answered {answer!r}: the scorer cannot read it ({type(error).__name__})")
    if not right and entry["answer"] is not None:
        _check_own_answer(scorer, entry, family)
    return graded(right, f"answered {answer!r}")


def _check_own_answer(scorer: Any, entry: dict[str, Any], family: str) -> None:
    """An entry damaged on its way (JSON turns tuples into lists) would give a zero to every right answer."""
    own = entry["answer"]
    if own is None or scorer.score_answer(own, entry) < 1:
        raise RuntimeError(f"{family}: the scorer does not give full marks to the entry's own answer {str(own)[:40]!r}")


@functools.lru_cache(maxsize=128)
def _scorer(family: str, config: str) -> Any:
    if family in REFUSED:
        raise InputError(f"reasoning-gym's '{family}' is refused: {REFUSED[family]}")
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise MissingExtraError("reasoning-gym", "reasoning-gym") from None
    if family not in DATASETS:
        nearest = difflib.get_close_matches(family, DATASETS, n=1, cutoff=0.0)[0]
        raise InputError(f"reasoning-gym has no family '{family}': did you mean '{nearest}'?")
    return create_dataset(family, size=1, seed=0, **json.loads(config))


def warm_up(metadata: dict[str, Any]) -> None:
    """Imports reasoning-gym and sets the family up, which takes seconds."""
    _scorer(metadata["dataset"], json.dumps(metadata.get("config", {}), sort_keys=True))
