"""What the answers of one version of a model were worth, and whether a new version may stay.

A version goes back only if it is worse by more than chance explains: shares are compared by their intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean

from serve.config import Upgrade

_KEPT = 5000  # times and rewards of a version
# Standard deviations beyond which a difference is no chance: at the end three shares are compared once, at 0.8 % each;
# before it they are compared again and again, and only what is plain counts.
_AT_THE_END, _BEFORE = 2.4, 3.5
_LEAST_FAILED = 5
_LEAST_TIMED = 20
_LEAST_RATED = 10
_SLOW = 0.05  # the share of answers that take longer than the 95th percentile


@dataclass
class Seen:
    """Of one version's answers."""

    requests: int = 0
    failed: int = 0  # with status 500 and above
    seconds: list[float] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)  # in [-1, 1], by request: the last one counts

    def add(self, other: Seen) -> None:
        self.requests += other.requests
        self.failed += other.failed
        self.seconds += other.seconds
        del self.seconds[:-_KEPT]
        for request, reward in other.rewards.items():
            self.rewards.pop(request, None)
            self.rewards[request] = reward
        for request in list(self.rewards)[:-_KEPT]:
            del self.rewards[request]


def verdict(old: Seen, new: Seen, rule: Upgrade, final: bool = True) -> str:
    """Return why the new version must go back; nothing if it may stay. `final`: no other look follows."""
    z = _AT_THE_END if final else _BEFORE
    if new.failed >= _LEAST_FAILED and _above(_share(new), new.requests, _share(old), old.requests, z, rule.errors):
        return f"{_share(new):.1%} of its requests failed, {_share(old):.1%} of the old one's"
    if min(len(old.seconds), len(new.seconds)) >= _LEAST_TIMED:
        allowed = rule.slower * _p95(old.seconds)
        slow = sum(seconds > allowed for seconds in new.seconds) / len(new.seconds)
        if interval(slow, len(new.seconds), z)[0] > _SLOW:
            return f"95 % of its answers took up to {_p95(new.seconds):.3f} s, the old one's {_p95(old.seconds):.3f} s"
    if min(len(old.rewards), len(new.rewards)) >= _LEAST_RATED:
        was, now = fmean(old.rewards.values()), fmean(new.rewards.values())
        # As shares of what could be earned. No values between 0 and 1 vary more than 0 and 1 do.
        if _above((1 - now) / 2, len(new.rewards), (1 - was) / 2, len(old.rewards), z, rule.feedback / 2):
            return f"its feedback is {now:.2f} in the mean, the old one's {was:.2f}"
    return ""


def interval(share: float, count: int, z: float) -> tuple[float, float]:
    """Wilson's interval of a share of `count` (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _above(new: float, new_count: int, old: float, old_count: int, z: float, allowed: float) -> bool:
    """Whether the new share is more than `allowed` above the old one, and above it beyond chance: the interval of
    their difference (Newcombe 1998, method 10) leaves zero out. Without an old one the new share alone must be."""
    if not old_count:
        return interval(new, new_count, z)[0] > allowed
    low, high = interval(new, new_count, z)[0], interval(old, old_count, z)[1]
    return new - old > allowed and new - old > math.hypot(new - low, high - old)


def _share(seen: Seen) -> float:
    return seen.failed / seen.requests if seen.requests else 0.0


def _p95(seconds: list[float]) -> float:
    return quantile(seconds, 0.95)


def quantile(values: list[float], share: float) -> float:
    """The nearest rank."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
