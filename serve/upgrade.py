"""A new version of a model under load: beside the old one, on a share of the requests, judged, then in its place.

No request fails for it: the old version answers until the new one is ready, and while it is put in the old one's place
all requests go to the copy that was tried. A version that is worse by the config's rule goes back by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import ray
from ray import serve as ray_serve

from serve import app, traffic
from serve.config import ModelEntry, Upgrade
from serve.seen import verdict
from srl_rlvr.errors import InputError

_LOOKED_EVERY_S = 1.0
_SPREAD_S = 3.0  # until every gateway has asked for the shares


def upgrade(
    old: ModelEntry, new: ModelEntry, rule: Upgrade, say: Callable[[str], None], stopped: Callable[[], bool]
) -> bool:
    """Whether `new` answers for its name now. Raises InputError where its folder holds no such model."""
    name, trial = new.name, f"{new.name}-{int(time.time())}"
    director = traffic.actor()

    def direct(shares: traffic.Shares) -> None:
        ray.get(director.direct.remote(name, shares))
        time.sleep(_SPREAD_S)

    if app.served(new).model_type != app.served(old).model_type:
        raise InputError(f"{new.path} holds a model of another type")
    say(f"{name}: a new version starts: {new.path}")
    try:
        ray_serve.run(app.build([new]), name=trial, route_prefix=None)
    except RuntimeError as error:
        ray_serve.delete(trial)
        say(f"{name}: the new version does not start, the old one stays: {str(error).splitlines()[0][:200]}")
        return False
    direct({name: 1 - rule.share, trial: rule.share})
    say(f"{name}: {rule.share:.0%} of the requests go to the new version")
    until = time.monotonic() + 60 * rule.minutes
    while True:
        seen, tried = ray.get([director.of.remote(name), director.of.remote(trial)])
        enough = tried.requests >= rule.requests or time.monotonic() > until
        fault = verdict(seen, tried, rule) if enough or tried.requests >= rule.requests / 4 else ""
        fault = "serving ends" if stopped() else fault
        if fault:
            direct({name: 1.0})
            ray_serve.delete(trial)
            say(f"{name}: the old version stays: {fault}")
            return False
        if enough:
            break
        time.sleep(_LOOKED_EVERY_S)
    direct({trial: 1.0})
    try:
        ray_serve.run(app.build([new]), name=name, route_prefix=None)
    except RuntimeError as error:
        say(f"{name}: WARNING: the new version answers from '{trial}'; in the old one's place it does not start: "
            f"{str(error).splitlines()[0][:200]}")  # fmt: skip
        return True
    direct({name: 1.0})
    ray_serve.delete(trial)
    say(f"{name}: the new version has taken over after {tried.requests} requests")
    return True
