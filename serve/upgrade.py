"""A new version of a model under load: beside the old one, on a share of the requests, judged, then in its place.

No request fails for it: the old version answers until the new one is ready, and while it is put in the old one's place
all requests go to the copy that was tried. A version that is worse by the config's rule goes back by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import ray
from ray import serve as ray_serve

from serve import app, traffic
from serve.config import ModelEntry, Upgrade
from serve.seen import verdict
from srl_rlvr.errors import InputError

_LOOKED_EVERY_S = 1.0
_SPREAD_S = 3.0  # until every gateway has asked for the shares


def upgrade(
    models: Sequence[ModelEntry],
    new: ModelEntry,
    rule: Upgrade,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> bool:
    """Whether `new` answers for its name now, in the place of that of `models` with this name. Those that share a base
    with it are deployed anew with it, and answer all the while. Raises InputError where its folder holds no such model.
    """
    group = next(group for group in app.grouped(models) if any(entry.name == new.name for entry in group))
    old = next(entry for entry in group if entry.name == new.name)
    renewed = [new if entry is old else entry for entry in group]
    name, usual = new.name, app.application_of(group)
    trial = f"{usual}-{int(time.time())}"
    director = traffic.actor()

    def direct(shares: traffic.Shares, *names: str) -> None:
        ray.get([director.direct.remote(each, shares) for each in names])
        time.sleep(_SPREAD_S)

    if app.served(new).model_type != app.served(old).model_type:
        raise InputError(f"{new.path} holds a model of another type")
    say(f"{name}: a new version starts: {new.path}")
    try:
        ray_serve.run(app.build(renewed), name=trial, route_prefix=None)
    except RuntimeError as error:
        ray_serve.delete(trial)
        say(f"{name}: the new version does not start, the old one stays: {str(error).splitlines()[0][:200]}")
        return False
    direct({usual: 1 - rule.share, trial: rule.share}, name)
    say(f"{name}: {rule.share:.0%} of the requests go to the new version")
    until = time.monotonic() + 60 * rule.minutes
    while True:
        seen, tried = ray.get([director.of.remote(application, name) for application in (usual, trial)])
        enough = tried.requests >= rule.requests or time.monotonic() > until
        fault = verdict(seen, tried, rule) if enough or tried.requests >= rule.requests / 4 else ""
        fault = "serving ends" if stopped() else fault
        if fault:
            direct({usual: 1.0}, name)
            ray_serve.delete(trial)
            say(f"{name}: the old version stays: {fault}")
            return False
        if enough:
            break
        time.sleep(_LOOKED_EVERY_S)
    everyone = [entry.name for entry in group]
    direct({trial: 1.0}, *everyone)
    try:
        ray_serve.run(app.build(renewed), name=usual, route_prefix=None)
    except RuntimeError as error:
        say(f"{name}: WARNING: the new version answers from '{trial}'; in the old one's place it does not start: "
            f"{str(error).splitlines()[0][:200]}")  # fmt: skip
        return True
    direct({usual: 1.0}, *everyone)
    ray_serve.delete(trial)
    say(f"{name}: the new version has taken over after {tried.requests} requests")
    return True
