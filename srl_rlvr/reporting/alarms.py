"""Curves that warn: what goes wrong in a stage is named while it happens, with the step.

It is told the metrics of each update, in order, and knows nothing else. Each alarm is raised once in a stage. Healthy
runs stay within the bounds: an alarm says "look here", not "this run is lost".
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

# Steps whose median stands for the beginning of a stage, and for now.
_WINDOW = 3
# Nats per token below which a policy hardly explores, as long as there is something left to learn.
_ENTROPY = 0.02
_SOLVED = 0.95
# Growth of completions over the beginning of the stage.
_LENGTH_FACTOR = 2.0
# The share of completions that are cut off.
CUT_OFF = 0.9
# Reward lost by well-formed answers while the mean reward of all rises.
_HACKED = 0.05
# Nats per token between engine and learner (rounding makes 1e-6), for each version of staleness once more.
_DIVERGENCE = 0.05
# Nats per token between the policy and the reference that it began the stage with.
_KL = 0.5
# Steps in a row without an update.
_IDLE = 5


@dataclass(frozen=True)
class Alarm:
    name: str
    stage: str
    step: int  # 0-based in the stage
    detail: str

    def __str__(self) -> str:
        return f"{self.stage}, step {self.step + 1}: {self.name}: {self.detail}"


class Watch:
    """Give it every row of metrics; `rows` are those of a run that goes on."""

    def __init__(self, rows: Iterable[Row] = ()):
        self.alarms: list[Alarm] = []
        self._stage: list[Row] = []
        for row in rows:
            self.look(row)

    def look(self, row: Row) -> list[Alarm]:
        """The alarms that this update raises for the first time in its stage."""
        if self._stage and self._stage[-1]["stage"] != row["stage"]:
            self._stage = []
        if "completion_tokens" not in row and "reward" not in row:  # SFT samples nothing
            return []
        self._stage.append(row)
        known = {alarm.name for alarm in self.alarms if alarm.stage == row["stage"]}
        raised = [
            Alarm(name, row["stage"], row["step"], detail)
            for name, detector in _DETECTORS.items()
            if name not in known and (detail := detector(self._stage))
        ]
        self.alarms += raised
        return raised


def _median(rows: Sequence[Row], name: str) -> float | None:
    """Of the rows that have this metric; None where there are too few."""
    values = [row[name] for row in rows if name in row]
    return statistics.median(values) if len(values) == _WINDOW else None


def _mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean([row[name] for row in rows if name in row] or [0.0])


def _then_and_now(rows: Sequence[Row], name: str) -> tuple[float, float] | None:
    """Medians of the stage's first steps and of its last ones; None before they are apart."""
    if len(rows) < 2 * _WINDOW:
        return None
    then, now = _median(rows[:_WINDOW], name), _median(rows[-_WINDOW:], name)
    return None if then is None or now is None else (then, now)


def _entropy_collapse(rows: Sequence[Row]) -> str:
    found = _then_and_now(rows, "entropy")
    if not found or found[1] >= min(_ENTROPY, found[0] / 2) or rows[-1]["pass_rate"] >= _SOLVED:
        return ""
    return (
        f"entropy fell from {found[0]:.3f} to {found[1]:.3f} nats a token with {rows[-1]['pass_rate']:.0%} of samples "
        "right; lower the learning rate, or set kl"
    )


def _length_explosion(rows: Sequence[Row]) -> str:
    length, cut = _then_and_now(rows, "completion_tokens"), _then_and_now(rows, "truncated")
    if length and length[1] > _LENGTH_FACTOR * length[0]:
        return f"completions grew from {length[0]:.0f} to {length[1]:.0f} tokens; look at rollouts, or lower max_tokens"
    if cut and cut[0] < CUT_OFF / 2 and cut[1] > CUT_OFF:
        return f"{cut[1]:.0%} of completions are cut off at max_tokens, {cut[0]:.0%} were; raise max_tokens, or set kl"
    return ""


def _format_hacking(rows: Sequence[Row]) -> str:
    reward, well_formed = _then_and_now(rows, "reward"), _then_and_now(rows, "scored_reward")
    if not reward or not well_formed or reward[1] <= reward[0] or well_formed[1] > well_formed[0] - _HACKED:
        return ""
    return (
        f"reward rose from {reward[0]:.2f} to {reward[1]:.2f}, but that of well-formed answers fell from "
        f"{well_formed[0]:.2f} to {well_formed[1]:.2f}: the form is learned instead of the task"
    )


def _cut_off(rows: Sequence[Row]) -> str:
    """From the first steps on; if the stage began otherwise, that is a length explosion."""
    then, now = (_mean(part, "truncated") for part in (rows[:_WINDOW], rows[-_WINDOW:]))
    if len(rows) < 2 or now < CUT_OFF or then < CUT_OFF / 2:
        return ""
    return (
        f"{now:.0%} of completions are cut off at max_tokens before they end; raise "
        f"stages.{rows[-1]['stage']}.max_tokens"
    )


def _no_update(rows: Sequence[Row]) -> str:
    if len(rows) < _IDLE or any("loss" in row for row in rows[-_IDLE:]):
        return ""
    return f"none in the last {_IDLE} steps: {_why_idle(rows[-_IDLE:])}"


def _why_idle(rows: Sequence[Row]) -> str:
    cut_off = _mean(rows, "truncated")
    if cut_off >= CUT_OFF:
        return f"{cut_off:.0%} of completions are cut off; raise stages.{rows[-1]['stage']}.max_tokens"
    if _mean(rows, "pass_rate") >= _SOLVED:
        return "the problems are solved; use harder ones, or end the stage earlier"
    if _mean(rows, "failed") > max(_mean(rows, "scored"), _mean(rows, "invalid")):
        return "most verifications failed; see 'detail' in the report's rollouts"
    return (
        "the samples of each problem earn the same reward; use easier problems, raise temperature or group_size, or "
        "train an sft stage first"
    )


def without_update(rows: Iterable[Row]) -> list[str]:
    """A line for each stage that made no update at all; `rows` are those of a whole run."""
    stages: dict[str, list[Row]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    return [
        f"{label} made no update in {len(of_stage)} steps, so it ends with the weights that it began with: "
        f"{_why_idle(of_stage)}"
        for label, of_stage in stages.items()
        if not any("loss" in row for row in of_stage)
    ]


def _divergence(rows: Sequence[Row]) -> str:
    row = rows[-1]
    if row.get("divergence", 0.0) <= _DIVERGENCE * (1 + row.get("staleness", 0.0)):
        return ""
    return f"KL(engine || learner) is {row['divergence']:.3f} nats a token: they do not hold the same weights"


def _kl_runaway(rows: Sequence[Row]) -> str:
    now = _median(rows[-_WINDOW:], "kl")
    if now is None or now <= _KL:
        return ""
    return f"the policy is {now:.2f} nats a token from the stage's start; raise kl, or lower the learning rate"


_DETECTORS: dict[str, Callable[[Sequence[Row]], str]] = {
    "entropy collapse": _entropy_collapse,
    "length explosion": _length_explosion,
    "answers are cut off": _cut_off,
    "no update": _no_update,
    "reward hacking of the format": _format_hacking,
    "engine and learner diverge": _divergence,
    "KL runaway": _kl_runaway,
}
