"""Upgrades without Ray: its actor is an object, its applications are names."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from serve import traffic, upgrade
from serve.config import ModelEntry, ServeConfig
from serve.seen import Seen
from serve.starting import NotStartedError
from srl_rlvr.cli import serve as command
from srl_rlvr.errors import InputError
from srl_rlvr.registry.champions import Champion

OLD, NEW = ModelEntry(path="/old", name="Über"), ModelEntry(path="/new", name="Über")
USUAL = "%C3%9Cber"


class Cluster:
    """The actor, called directly, and the applications that run."""

    def __init__(self) -> None:
        self.state = traffic.Traffic.__ray_metadata__.modified_class()  # type: ignore[attr-defined]
        self.running, self.fails, self.splits = {USUAL}, dict[str, Callable[[], Any]](), list[traffic.Shares]()

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Any:
            if method == "direct":
                self.splits.append(arguments[1])
            if method in self.fails:
                self.fails[method]()
            if method == "of" and arguments[0] != USUAL:
                return Seen(300, 0)
            return getattr(self.state, method)(*arguments)

        return SimpleNamespace(remote=remote)

    def run(self, targets: Any, *_: Any, **__: Any) -> None:
        for name in targets:
            if name in self.fails or "trial" in self.fails and name != USUAL:
                self.fails.get(name, self.fails.get("trial"))()  # type: ignore[misc]
            self.running.add(name)

    @property
    def shares(self) -> traffic.Shares:
        return self.state.shares_of("Über")


def dies(error: Exception | None = None, once: bool = True) -> Callable[[], Any]:
    left = [1]

    def fail() -> None:
        if not once or left:
            left.clear()
            raise error or RayActorError

    return fail


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(traffic, "actor", lambda: found)
    monkeypatch.setattr(upgrade.ray, "get", lambda refs, timeout: refs)
    monkeypatch.setattr(upgrade.starting, "run", found.run)
    monkeypatch.setattr(upgrade.ray_serve, "delete", found.running.discard)
    monkeypatch.setattr(upgrade.ray_serve, "status", lambda: SimpleNamespace(applications=dict.fromkeys(found.running)))
    monkeypatch.setattr(upgrade.app, "build", lambda group: group)
    monkeypatch.setattr(upgrade.app, "served", lambda _: SimpleNamespace(model_type="task_llm"))
    monkeypatch.setattr(upgrade, "_SPREAD_S", 0.0)
    monkeypatch.setattr(upgrade.direct, "__kwdefaults__", {"wait_s": 0.0})
    monkeypatch.setattr(upgrade, "_LOOKED_EVERY_S", 0.0)
    return found


def run(cluster: Cluster, said: list[str], stopped: Callable[[], bool] = lambda: False) -> bool:
    return upgrade.upgrade([OLD], NEW, ServeConfig().upgrade, 1, said.append, stopped)


def test_a_version_that_is_as_good_takes_over(cluster: Cluster) -> None:
    assert run(cluster, [])
    assert cluster.running == {USUAL} and cluster.shares == {USUAL: 1.0}
    assert [len(shares) for shares in cluster.splits] == [2, 1, 1]


@pytest.mark.parametrize("where", ["of", "shares_of"])
def test_when_an_actor_dies_all_requests_go_to_the_old_version_again(cluster: Cluster, where: str) -> None:
    cluster.fails[where] = dies()
    with pytest.raises(RayActorError):
        run(cluster, [])
    assert cluster.running == {USUAL} and cluster.shares == {USUAL: 1.0}


def test_a_version_that_does_not_start_never_gets_a_request(cluster: Cluster) -> None:
    said: list[str] = []
    cluster.fails["trial"] = dies(NotStartedError("model 'Über' does not start: no weights"))
    assert not run(cluster, said)
    assert "no weights" in said[-1] and cluster.running == {USUAL}
    assert all(shares == {USUAL: 1.0} for shares in cluster.splits)


def test_the_new_version_answers_on_if_it_cannot_take_the_old_ones_place(cluster: Cluster) -> None:
    cluster.fails[USUAL] = dies(NotStartedError("no room"))
    assert run(cluster, [])
    [trial] = cluster.running - {USUAL}
    assert cluster.shares == {trial: 1.0}


def test_an_actor_that_starts_anew_is_told_the_split_again(cluster: Cluster) -> None:
    def forgets() -> None:
        cluster.fails.clear()
        cluster.state.shares.clear()

    cluster.fails["shares_of"] = forgets
    assert run(cluster, [])
    assert [len(shares) for shares in cluster.splits] == [2, 2, 1, 1]


def test_what_a_command_that_died_left_behind_is_put_back_at_the_start(cluster: Cluster) -> None:
    cluster.state.direct("Über", {USUAL: 0.9, f"{USUAL}-1700000000": 0.1})
    cluster.running |= {f"{USUAL}-1700000000", "other-1700000000", f"{USUAL}-x"}
    upgrade.reset([OLD])
    assert cluster.shares == {USUAL: 1.0}
    assert cluster.running == {USUAL, "other-1700000000", f"{USUAL}-x"}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Watch a registry for some polls: `found` is its champion at each, `upgrades` what comes of an upgrade to it.
    Returns the versions that upgrades were made to."""

    def watch(found: list[Any], upgrades: Callable[[str], bool]) -> list[str]:
        tried: list[str] = []
        over = threading.Event()
        polls = iter(found)

        def find(*_: Any) -> dict[str, Champion]:
            version = next(polls)
            if len(found) == find.calls + 1:
                over.set()
            find.calls += 1
            if isinstance(version, Exception):
                raise version
            return {"routing": champion(version)}

        find.calls = 0

        def upgraded(_: Any, new: ModelEntry, *__: Any) -> bool:
            tried.append(new.path)
            return upgrades(new.path)

        monkeypatch.setattr("srl_rlvr.registry.champions.find", find)
        monkeypatch.setattr("srl_rlvr.registry.champions.fetch", lambda of, _: Path(of.version))
        monkeypatch.setattr(upgrade, "upgrade", upgraded)
        monkeypatch.setattr(over, "wait", lambda _: find.calls == len(found))
        monkeypatch.setattr(over, "is_set", lambda: False)
        config = ServeConfig(models=[ModelEntry(path="1", name="router")])
        command._watch(config, {"router": champion("1")}, over)
        return tried

    return watch


def champion(version: str) -> Champion:
    return Champion("routing", version, 1, "s3://same/place", "sqlite:///x")


def test_the_same_version_is_never_upgraded_to_and_another_one_once(watched: Any) -> None:
    assert watched(["1"] * 5, lambda _: True) == []
    assert watched(["1", "2", "2", "2", "1", "1"], lambda _: True) == ["2", "1"]


def test_a_version_that_went_back_is_not_tried_again(watched: Any) -> None:
    assert watched(["2", "2", "2", "3", "3"], lambda version: version == "3") == ["2", "3"]


@pytest.mark.parametrize("error", [RayActorError(), InputError("no such"), RuntimeError("a\nb"), TimeoutError()])
def test_the_watch_outlives_errors_with_one_line_each(
    watched: Any, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def upgrades(version: str) -> bool:
        if version == "2":
            raise error
        return True

    assert watched(["2"] * 5 + [error, "3"], upgrades) == ["2", "2", "2", "3"]
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "old version" in line]) == 3
    assert len([line for line in said if "registry cannot be read" in line]) == 1
