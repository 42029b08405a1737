"""The held-out result of a run: its intervals, `result.json` and the table printed at the end.

It must not know how an answer was judged: it is handed counts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from srl_rlvr.errors import InputError

_Z_95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal distribution


class Interval(NamedTuple):
    """A pass rate with its 95 % interval, all in [0, 1]."""

    score: float
    low: float
    high: float


def interval(successes: int, n: int) -> Interval:
    """Wilson's score interval at 95 % (Wilson 1927, JASA 22:209-212; Brown, Cai and DasGupta 2001, eq. 4).

    Unlike the normal approximation it keeps to [0, 1] and stays honest near 0 and 1.
    Raises InputError: there were no problems, or more successes than problems.
    """
    if n <= 0:
        raise InputError("held-out set: no problems were evaluated; set data.held_out to 1 or more")
    if not 0 <= successes <= n:
        raise InputError(f"held-out set: {successes} successes among {n} problems")
    score = successes / n
    spread = _Z_95**2 / n
    center = (score + spread / 2) / (1 + spread)
    half = _Z_95 * math.sqrt(score * (1 - score) / n + spread / (4 * n)) / (1 + spread)
    # At 0 and n the bound is the score itself; rounding would put it 1e-17 beside it.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return Interval(score, low, high)


def mean_interval(scores: Sequence[float]) -> Interval:
    """Of the mean of scores in [0, 1]: Wilson's where each is 0 or 1, else by bootstrap (percentiles, 2,000 draws)."""
    values = np.asarray(scores, float)
    if np.isin(values, (0.0, 1.0)).all():
        return interval(int(values.sum()), len(values))
    draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def write_result(
    path: Path,
    model_type: str,
    held_out: Mapping[str, Interval],
    n: int,
    minutes: float,
    peak_memory_gib: float,
    sampled_tokens: int,
) -> dict[str, Any]:
    """Write `result.json` to `path` in one piece and return what it holds.

    `held_out` maps "base" and each stage's label, in the order of the run, to its pass rate on `n` problems.
    """
    result = {
        "model_type": model_type,
        "held_out": {"n": n, **{label: value._asdict() for label, value in held_out.items()}},
        "minutes": minutes,
        "peak_memory_gib": peak_memory_gib,
        "sampled_tokens": sampled_tokens,
    }
    write_atomically(path, json.dumps(result, indent=2) + "\n")
    return result


def table(held_out: Mapping[str, Interval], n: int, metric: str = "pass rate") -> str:
    """Plain text: one row for each label with its `metric`, interval and gain over the row before, in percent."""
    width = max(len("model"), *(len(label) for label in held_out))
    rows = [f"{'model':<{width}}  {metric:>9}  95 % interval      gain   ({n} held-out problems)"]
    before: float | None = None
    for label, value in held_out.items():
        bounds = f"{value.low:.1%} to {value.high:.1%}"
        gain = "" if before is None else f"{100 * (value.score - before):+.1f}"
        rows.append(f"{label:<{width}}  {value.score:>9.1%}  {bounds:<16}  {gain:>5}".rstrip())
        before = value.score
    return "\n".join(rows)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader, or a crash, sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
