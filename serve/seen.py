"""What the answers of one version of a model were worth, and whether a new version may stay."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean

from serve.config import Upgrade

_KEPT = 5000  # times of a version


@dataclass
class Seen:
    """Of one version's answers."""

    requests: int = 0
    failed: int = 0  # with status 500 and above
    seconds: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        self.requests += other.requests
        self.failed += other.failed
        for kept, more in ((self.seconds, other.seconds), (self.rewards, other.rewards)):
            kept += more
            del kept[:-_KEPT]


def verdict(old: Seen, new: Seen, rule: Upgrade) -> str:
    """Why the new version is to go back; nothing where it may stay."""
    if _share(new) > _share(old) + rule.errors:
        return f"{_share(new):.1%} of its requests failed, {_share(old):.1%} of the old one's"
    if old.seconds and new.seconds and _p95(new.seconds) > rule.slower * _p95(old.seconds):
        return f"95 % of its answers took up to {_p95(new.seconds):.3f} s, the old one's {_p95(old.seconds):.3f} s"
    if old.rewards and new.rewards and fmean(new.rewards) < fmean(old.rewards) - rule.feedback:
        return f"its feedback is {fmean(new.rewards):.2f} in the mean, the old one's {fmean(old.rewards):.2f}"
    return ""


def _share(seen: Seen) -> float:
    return seen.failed / seen.requests if seen.requests else 0.0


def _p95(seconds: list[float]) -> float:
    return quantile(seconds, 0.95)


def quantile(values: list[float], share: float) -> float:
    """The nearest rank."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
