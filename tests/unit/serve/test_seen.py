from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from serve.config import Upgrade
from serve.seen import Seen, interval, verdict


def seen(requests: int, failed: int, seconds: Sequence[float] = (), rewards: Sequence[float] = ()) -> Seen:
    return Seen(requests, failed, list(seconds), {str(number): reward for number, reward in enumerate(rewards)})


GOOD = seen(1000, 10, [0.1] * 1000, [1.0, 0.0] * 20)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (seen(100, 1, [0.14] * 100, [0.5] * 20), ""),
        (seen(200, 12, [0.1] * 200), "6.0% of its requests failed, 1.0% of the old one's"),
        (seen(200, 4, [0.1] * 200), ""),
        (seen(100, 0, [0.1] * 85 + [0.2] * 15), "up to 0.200 s, the old one's 0.100 s"),
        (seen(100, 0, [0.1] * 97 + [9.0] * 3), ""),
        (seen(100, 0, [0.1] * 100, [-1.0, 0.0] * 20), "feedback is -0.50 in the mean, the old one's 0.50"),
        (seen(100, 0, [0.1] * 100, [0.45] * 1000), ""),
        (Seen(), ""),
    ],
)
def test_a_new_version_goes_back_if_it_is_worse_by_more_than_the_rule_and_chance_allow(new: Seen, said: str) -> None:
    found = verdict(GOOD, new, Upgrade())
    assert said in found and bool(found) == bool(said)


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (seen(450, 0), seen(50, 1)),
        (seen(450, 0), seen(50, 2)),
        (seen(100_000, 0), seen(50, 1)),
        (seen(0, 0), seen(50, 1)),
        (seen(450, 0, rewards=[1.0]), seen(50, 0, rewards=[-1.0])),
        (seen(450, 0, rewards=[1.0] * 500), seen(50, 0, rewards=[-1.0] * 3)),
        (seen(450, 0, rewards=[1.0] * 100), seen(50, 0, rewards=[1.0] * 30 + [-1.0])),
        (seen(450, 0, [0.1] * 450), seen(5, 0, [9.0] * 5)),
    ],
)
def test_a_few_failures_or_complaints_never_send_a_version_back(old: Seen, new: Seen, final: bool) -> None:
    assert verdict(old, new, Upgrade(), final) == ""


def test_without_an_old_version_to_compare_with_only_failures_count() -> None:
    assert not verdict(Seen(), seen(50, 0, [9.0] * 50, [-1.0] * 50), Upgrade())
    assert verdict(Seen(), seen(50, 10), Upgrade())


def test_what_was_seen_adds_up_and_only_the_newest_are_kept() -> None:
    found = Seen()
    for number in range(6000):
        found.add(Seen(1, number % 2, [float(number)], {str(number): 1.0}))
    assert (found.requests, found.failed, len(found.seconds), found.seconds[-1]) == (6000, 3000, 5000, 5999.0)
    assert len(found.rewards) == 5000 and "5999" in found.rewards


def test_the_last_reward_of_a_request_counts() -> None:
    found = Seen(rewards={"a": 1.0, "b": 1.0})
    found.add(Seen(rewards={"a": -1.0}))
    assert found.rewards == {"b": 1.0, "a": -1.0}


def test_the_interval_is_wilsons() -> None:
    assert interval(0.0, 0, 2.0) == (0.0, 1.0)
    assert interval(0.1, 100, 1.96) == pytest.approx((0.0552, 0.1744), abs=1e-4)  # scipy.stats.binomtest
    assert interval(0.0, 50, 1.96) == pytest.approx((0.0, 0.0713), abs=1e-4)


def goes_back(rng: np.random.Generator, errors: tuple[float, float], likes: tuple[float, float], share: float) -> bool:
    """One upgrade as it runs: a look after every few requests from a quarter of them on, the last one at the end."""
    rule, old, new = Upgrade(), Seen(), Seen()
    while new.requests < rule.requests:
        for _ in range(10):
            of, which = (new, 1) if rng.random() < share else (old, 0)
            rated = {str(rng.random()): 1.0 if rng.random() < likes[which] else -1.0} if rng.random() < 0.2 else {}
            of.add(Seen(1, int(rng.random() < errors[which]), [rng.lognormal(-2, 1)], rated))
        if new.requests >= rule.requests / 4 and verdict(old, new, rule, final=new.requests >= rule.requests):
            return True
    return False


@pytest.mark.parametrize(
    ("errors", "likes", "share", "least", "most"),
    [
        ((0.0, 0.0), (0.8, 0.8), 0.5, 0.0, 0.05),
        ((0.01, 0.01), (0.8, 0.8), 0.2, 0.0, 0.05),
        ((0.05, 0.05), (0.5, 0.5), 0.5, 0.0, 0.05),
        ((0.2, 0.2), (0.5, 0.5), 0.2, 0.0, 0.05),
        ((0.0, 0.05), (0.8, 0.8), 0.2, 0.8, 1.0),
        ((0.01, 0.06), (0.8, 0.8), 0.2, 0.7, 1.0),
        ((0.01, 0.2), (0.8, 0.8), 0.5, 0.95, 1.0),
        ((0.01, 0.01), (0.8, 0.4), 0.2, 0.7, 1.0),
    ],
)
def test_equal_versions_stay_and_worse_ones_go_back(
    errors: tuple[float, float], likes: tuple[float, float], share: float, least: float, most: float
) -> None:
    rng = np.random.default_rng(0)
    found = sum(goes_back(rng, errors, likes, share) for _ in range(200)) / 200
    assert least <= found <= most
