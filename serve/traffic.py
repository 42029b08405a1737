"""Two versions of one model at a time: which share of the requests each answers, and what its answers were worth.

`Traffic` is a Ray actor that the gateways ask every second and tell what they saw since. It may be lost: a model that
it knows nothing of is answered by its usual application.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from actors.cluster import NAMESPACE
from serve.seen import Seen

log = logging.getLogger(__name__)

NAME = "srl-rlvr/traffic"
_ASKED_EVERY_S = 1.0

Shares = dict[str, float]  # of each application of a model; together 1


@ray.remote(num_cpus=0)
class Traffic:
    def __init__(self) -> None:
        self.shares: dict[str, Shares] = {}
        self.seen: dict[str, Seen] = {}

    def direct(self, model: str, shares: Shares) -> None:
        """From the next second on. What was seen of these versions is forgotten: a new comparison begins."""
        self.shares[model] = shares
        for application in shares:
            self.seen.pop(version(application, model), None)

    def exchange(self, seen: Mapping[str, Seen]) -> dict[str, Shares]:
        """For a gateway: what it saw since of each version, for the shares."""
        for name, of in seen.items():
            self.seen.setdefault(name, Seen()).add(of)
        return self.shares

    def shares_of(self, model: str) -> Shares:
        return self.shares.get(model, {})

    def of(self, application: str, model: str) -> Seen:
        return self.seen.get(version(application, model), Seen())


def actor() -> Any:
    """The one of this cluster."""
    return Traffic.options(  # type: ignore[attr-defined]
        name=NAME, namespace=NAMESPACE, get_if_exists=True, lifetime="detached", max_restarts=-1
    ).remote()


def version(application: str, model: str) -> str:
    """The name of a version of a model: one application answers for several that share a base."""
    return f"{application}/{model}"


def pick(model: str, shares: Mapping[str, Shares], usual: str) -> str:
    """The application that answers the next request for the model, `usual` where nothing is known of it."""
    of = shares.get(model)
    return random.choices(list(of), list(of.values()))[0] if of else usual


async def follow(shares: dict[str, Shares], take: Callable[[], dict[str, Seen]]) -> None:
    """A gateway's part, for ever: keeps `shares` as the actor has them, and tells it what `take` returns."""
    director = actor()
    while True:
        await asyncio.sleep(_ASKED_EVERY_S)
        try:
            found = await asyncio.wait_for(director.exchange.remote(take()), 10)
        except (RayError, TimeoutError) as error:
            log.warning("no word from %s: %s", NAME, type(error).__name__)
            director = actor()
            continue
        shares.clear()
        shares.update(found)
