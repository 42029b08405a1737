"""A new version of a model under load: beside the old one, on a share of the requests, judged, then in its place.

No request fails for it: the old version answers until the new one is ready, and while it is put in the old one's place
all requests go to the copy that was tried. A version that is worse by the config's rule goes back by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve import app, starting, traffic
from serve.config import ModelEntry, Upgrade
from serve.seen import verdict
from srl_rlvr.errors import InputError

_LOOKED_EVERY_S = 1.0
_SPREAD_S = 3.0  # until every gateway has asked for the shares
_ACTOR_DEADLINE_S = 30.0  # of a call to it; it may be starting anew


def upgrade(
    models: Sequence[ModelEntry],
    new: ModelEntry,
    rule: Upgrade,
    deadline_s: float,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> bool:
    """Whether `new` answers for its name now, in the place of that of `models` with this name. Those that share a base
    with it are deployed anew with it, and answer all the while. Raises InputError if its folder holds no such model,
    and what Ray raises if its actors fail; either way all requests go to the old version again.
    """
    group = next(group for group in app.grouped(models) if any(entry.name == new.name for entry in group))
    old = next(entry for entry in group if entry.name == new.name)
    renewed = [new if entry is old else entry for entry in group]
    names, name, usual = [entry.name for entry in group], new.name, app.application_of(group)
    if app.served(new).model_type != app.served(old).model_type:
        raise InputError(f"{new.path} holds a model of another type")
    say(f"{name}: a new version starts: {new.path}")
    trial, kept = f"{usual}-{int(time.time())}", False
    try:
        try:
            starting.run({trial: (app.build(renewed), [name])}, deadline_s, stopped=stopped)
        except starting.NotStartedError as error:
            say(f"{name}: the new version does not start, the old one stays: {error}")
            return False
        fault, requests = _compare(name, usual, trial, rule, say, stopped)
        if fault:
            say(f"{name}: the old version stays: {fault}")
            return False
        direct({trial: 1.0}, *names)
        kept = True
        try:
            starting.run({usual: (app.build(renewed), names)}, deadline_s)
        except starting.NotStartedError as error:
            say(f"{name}: WARNING: the new version answers from '{trial}'; in the old one's place: {error}")
            return True
        kept = False
        say(f"{name}: the new version has taken over after {requests} requests")
        return True
    finally:
        if not kept:
            _end_trial(usual, trial, names)


def reset(models: Sequence[ModelEntry]) -> None:
    """Send all requests to the usual applications, and end the trials of a command that died in the middle of one."""
    for group in app.grouped(models):
        usual = app.application_of(group)
        direct({usual: 1.0}, *(entry.name for entry in group), wait_s=0)
        for application in ray_serve.status().applications:
            begins, _, number = application.rpartition("-")
            if begins == usual and len(number) == 10 and number.isdigit():
                ray_serve.delete(application)


def direct(shares: traffic.Shares, *names: str, wait_s: float = _SPREAD_S) -> None:
    """Have the models of these names answered in these shares from now on, by every gateway."""
    director = traffic.actor()
    ray.get([director.direct.remote(each, shares) for each in names], timeout=_ACTOR_DEADLINE_S)
    time.sleep(wait_s)


def _compare(
    name: str, usual: str, trial: str, rule: Upgrade, say: Callable[[str], None], stopped: Callable[[], bool]
) -> tuple[str, int]:
    """Why the trial must go back, or nothing, and how many requests it has answered."""
    split = {usual: 1 - rule.share, trial: rule.share}
    direct(split, name)
    say(f"{name}: {rule.share:.0%} of the requests go to the new version")
    until = time.monotonic() + 60 * rule.minutes
    while True:
        director = traffic.actor()
        asked = [director.shares_of.remote(name), *(director.of.remote(each, name) for each in (usual, trial))]
        shares, seen, tried = ray.get(asked, timeout=_ACTOR_DEADLINE_S)
        if shares != split:  # the actor has started anew, and knows nothing
            direct(split, name)
            continue
        over = tried.requests >= rule.requests or time.monotonic() > until
        fault = verdict(seen, tried, rule, final=over) if over or tried.requests >= rule.requests / 4 else ""
        fault = "serving ends" if stopped() else fault
        if fault or over:
            return fault, tried.requests
        time.sleep(_LOOKED_EVERY_S)


def _end_trial(usual: str, trial: str, names: Sequence[str]) -> None:
    """All requests to the usual application, then the trial's end; each is tried, whatever became of the other."""
    calls: list[Callable[[], Any]] = [lambda: direct({usual: 1.0}, *names), lambda: ray_serve.delete(trial)]
    for call in calls:
        with contextlib.suppress(RayError, RayServeException, RuntimeError, TimeoutError):
            call()
