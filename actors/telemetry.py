"""Metrics of the run on Ray's own endpoint, where the dashboard and Prometheus read them as `ray_srl_rlvr_*`."""

from __future__ import annotations

import string
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from actors.cluster import ascii_name
from srl_rlvr.records import OUTCOMES

_GAUGES = {
    "reward": "Mean reward of the batch",
    "pass_rate": "Share of samples that earn full reward",
    "staleness": "Policy versions between sampling and learning",
    "divergence": "k3 estimate of KL(engine || learner) over sampled tokens",
    "tokens_per_s": "Sampled tokens a second",
    "grad_norm": "Gradient norm before clipping",
    "entropy": "Mean -log probability of sampled tokens",
    "groups_drawn": "Groups of samples that were drawn for the update",
}
_READABLE = string.punctuation.replace("%", "") + " "
_SECONDS = ("sample_s", "verify_s", "update_s", "handover_s")
_BOUNDS_S = [0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300]


class Telemetry:
    """One method: `step` sets the gauges and fills the histograms of one update."""

    def __init__(self, run: str):
        tags = {"run": _tag(run)}
        keys = ("run", "stage")
        self._gauges = {name: Gauge(f"srl_rlvr_{name}", text, tag_keys=keys) for name, text in _GAUGES.items()}
        self._outcomes = Counter("srl_rlvr_outcomes", "Verdicts by outcome", tag_keys=(*keys, "outcome"))
        self._reward = Histogram(
            "srl_rlvr_step_reward", "Mean reward of each batch", boundaries=[0.01, 0.25, 0.5, 0.75, 0.95, 1.01],
            tag_keys=keys,
        )  # fmt: skip
        self._seconds = {
            name: Histogram(
                f"srl_rlvr_{name}econds", f"{name[:-2]} time of a step", boundaries=_BOUNDS_S, tag_keys=keys
            )
            for name in _SECONDS
        }
        for metric in [*self._gauges.values(), self._outcomes, self._reward, *self._seconds.values()]:
            metric.set_default_tags(tags)

    def step(self, metrics: dict[str, Any]) -> None:
        tags = {"stage": _tag(metrics["stage"])}
        for name, gauge in self._gauges.items():
            if name in metrics:
                gauge.set(metrics[name], tags)
        for name, histogram in self._seconds.items():
            if metrics.get(name, 0) > 0:
                histogram.observe(metrics[name], tags)
        if "reward" in metrics:
            self._reward.observe(metrics["reward"], tags)
        if OUTCOMES[0] in metrics:
            for outcome in OUTCOMES:
                if metrics[outcome]:
                    self._outcomes.inc(metrics[outcome], {**tags, "outcome": outcome})


def _tag(name: str) -> str:
    """A user's name as a tag: Ray takes ASCII only."""
    return ascii_name(name, keep=_READABLE)
