from __future__ import annotations

import pytest

from serve.config import Upgrade
from serve.seen import Seen, verdict

GOOD = Seen(100, 1, [0.1] * 100, [1.0, 0.0])


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (Seen(100, 1, [0.14] * 100, [0.5]), ""),
        (Seen(100, 3, [0.1] * 100, []), "3.0% of its requests failed, 1.0% of the old one's"),
        (Seen(100, 0, [0.1] * 90 + [0.2] * 10, []), "up to 0.200 s, the old one's 0.100 s"),
        (Seen(100, 0, [0.1] * 97 + [9.0] * 3, []), ""),
        (Seen(100, 0, [0.1] * 100, [0.0, 0.5]), "feedback is 0.25 in the mean, the old one's 0.50"),
        (Seen(), ""),
    ],
)
def test_a_new_version_goes_back_where_it_is_worse_by_more_than_the_rule_allows(new: Seen, said: str) -> None:
    found = verdict(GOOD, new, Upgrade())
    assert said in found and bool(found) == bool(said)


def test_without_an_old_version_to_compare_with_only_failures_count() -> None:
    assert not verdict(Seen(), Seen(10, 0, [9.0] * 10, [-1.0]), Upgrade())
    assert verdict(Seen(), Seen(10, 1), Upgrade())


def test_what_was_seen_adds_up_and_only_the_newest_times_are_kept() -> None:
    seen = Seen()
    for number in range(6000):
        seen.add(Seen(1, number % 2, [float(number)]))
    assert (seen.requests, seen.failed, len(seen.seconds), seen.seconds[-1]) == (6000, 3000, 5000, 5999.0)
