"""The dispatcher with real Ray and actors that do as they are told: order of calls, deadlines, deaths, echoes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.exceptions
from cli_runs import ROOT, TESTS

from actors.dispatcher import Dispatcher
from srl_rlvr import records
from srl_rlvr.config import EngineConfig
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import RunError
from srl_rlvr.policies.weights import Manifest
from srl_rlvr.scheduling import Ticket, exact_ticket, free_ticket

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

SPEC = SamplingSpec(samples=1, temperature=1.0, max_tokens=4)


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    path = os.pathsep.join([str(ROOT), str(TESTS)])
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )  # fmt: skip
    yield
    ray.shutdown()


class Puppet:
    """A generator and a verifier. What it is told to do stands in files of `folder`, which outlive it."""

    def __init__(self, folder: str):
        self.folder, self.version = Path(folder), 0

    def generate(self, prompts: pa.Table, spec: SamplingSpec) -> pa.Table:
        self._obey()
        rows = [
            {
                "prompt_id": i, "sample_index": 0, "policy_version": self.version, "token_ids": [1], "logprobs": [0.0],
                "text": "", "finish_reason": "stop",
            }
            for i in prompts["id"].to_pylist()
        ]  # fmt: skip
        return records.build("Rollout", rows)

    def score(self, prompts: pa.Table, rollouts: pa.Table) -> pa.Table:
        (self.folder / "scored").touch()
        rows = [
            {"prompt_id": i, "sample_index": 0, "outcome": "scored", "reward": 1.0, "components": "{}", "detail": ""}
            for i in rollouts["prompt_id"].to_pylist()
        ]
        return records.build("Verdict", rows)

    def load(self, buffer: Any, manifest: Manifest) -> tuple[int, str]:
        self.version = manifest.version
        return manifest.version, "damaged" if (self.folder / "damaged").exists() else manifest.checksum

    @ray.method(concurrency_group="health")
    def health(self) -> None: ...

    def _obey(self) -> None:
        (self.folder / "sampling").touch()
        while (self.folder / "wait").exists():
            time.sleep(0.01)
        if (self.folder / "die").exists():
            (self.folder / "die").unlink()
            os._exit(1)
        if (self.folder / "cursed").exists():
            os._exit(1)


Start = Callable[..., Dispatcher]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = [tmp_path / name for name in ("first", "second", "verifier")]
    for folder in made:
        folder.mkdir()
    return made


@pytest.fixture
def dispatcher(folders: list[Path], request: pytest.FixtureRequest) -> Iterator[Dispatcher]:
    """Two generators and a verifier; the parameter is the deadline of a call in seconds."""
    puppet = ray.remote(max_restarts=-1, concurrency_groups={"health": 1})(Puppet)  # type: ignore[call-overload]
    actors = [puppet.remote(str(folder)) for folder in folders]
    ray.get([actor.health.remote() for actor in actors])
    engine = EngineConfig(call_deadline_s=getattr(request, "param", 30.0), start_deadline_s=30.0)
    made = Dispatcher(actors[:2], actors[2:], engine, lambda: None)
    yield made
    made.close()
    for actor in actors:
        ray.kill(actor)


def prompts(count: int) -> pa.Table:
    rows = [
        {
            "id": str(n), "example_id": str(n), "stage": "rlvr", "step_index": -1, "token_ids": [1], "trunk_id": str(n),
            "offset": 1, "verifier": "number", "reference": "", "metadata": "{}",
        }
        for n in range(count)
    ]  # fmt: skip
    return records.build("Prompt", rows)


def free(count: int) -> Ticket:
    """One task for each prompt."""
    return free_ticket(prompts(count), SPEC, generators=2, max_running=1)


def versions(dispatcher: Dispatcher, ticket: Ticket, count: int) -> list[int]:
    dispatcher.receive(ticket)
    rollouts, verdicts = ticket.tables()
    assert rollouts["prompt_id"].to_pylist() == verdicts["prompt_id"].to_pylist() == [str(n) for n in range(count)]
    return rollouts["policy_version"].to_pylist()


def weights(version: int) -> tuple[list[Any], Manifest]:
    return [ray.put(b"weights")], Manifest(version, (), "checksum")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_task_is_verified_while_another_is_sampled(dispatcher: Dispatcher, folders: Sequence[Path]) -> None:
    (folders[0] / "wait").touch()
    ticket = free(4)
    dispatcher.send(ticket)
    until((folders[2] / "scored").exists)
    (folders[0] / "wait").unlink()
    assert versions(dispatcher, ticket, 4) == [0] * 4


def test_weights_are_loaded_behind_the_running_task_and_nobody_waits_for_that(
    dispatcher: Dispatcher, folders: Sequence[Path]
) -> None:
    for folder in folders[:2]:
        (folder / "wait").touch()
    before = exact_ticket(prompts(2), SPEC, generators=2)
    dispatcher.send(before)
    until(lambda: all((folder / "sampling").exists() for folder in folders[:2]))
    dispatcher.hand_over(weights(7), until_served=False)
    after = exact_ticket(prompts(2), SPEC, generators=2)
    dispatcher.send(after)
    for folder in folders[:2]:
        (folder / "wait").unlink()
    assert versions(dispatcher, before, 2) == [0, 0] and versions(dispatcher, after, 2) == [7, 7]


def test_what_a_dead_generator_held_is_sampled_by_the_other_and_the_dead_one_comes_back_with_the_weights(
    dispatcher: Dispatcher, folders: Sequence[Path]
) -> None:
    dispatcher.hand_over(weights(3), until_served=True)
    (folders[0] / "die").touch()
    ticket = free(8)
    dispatcher.send(ticket)
    assert versions(dispatcher, ticket, 8) == [3] * 8
    assert not (folders[0] / "die").exists()
    for version in (4, 5):
        dispatcher.hand_over(weights(version), until_served=True)
        ticket = exact_ticket(prompts(2), SPEC, generators=2)
        dispatcher.send(ticket)
        assert versions(dispatcher, ticket, 2) == [version] * 2


def test_a_generator_that_restarted_unnoticed_samples_anew(dispatcher: Dispatcher, folders: Sequence[Path]) -> None:
    dispatcher.hand_over(weights(3), until_served=True)
    (folders[0] / "die").touch()
    actor = dispatcher._generators[0]
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.generate.remote(prompts(1), SPEC))
    until(lambda: _answers(actor))
    ticket = exact_ticket(prompts(2), SPEC, generators=2)
    dispatcher.send(ticket)
    assert versions(dispatcher, ticket, 2) == [3, 3]


def _answers(actor: Any) -> bool:
    try:
        ray.get(actor.health.remote())
    except ray.exceptions.RayActorError:
        return False
    return True


def test_a_task_that_kills_every_generator_ends_the_run(dispatcher: Dispatcher, folders: Sequence[Path]) -> None:
    for folder in folders[:2]:
        (folder / "cursed").touch()
    ticket = free(1)
    dispatcher.send(ticket)
    with pytest.raises(RunError, match=r"^generators died 3 times over the same 1 prompts, generator-[01] last$"):
        dispatcher.receive(ticket)


@pytest.mark.parametrize("waits", [True, False])
def test_a_wrong_echo_ends_the_run(dispatcher: Dispatcher, folders: Sequence[Path], waits: bool) -> None:
    (folders[1] / "damaged").touch()
    (folders[0] / "wait").touch()
    ticket = free(4)
    dispatcher.send(ticket)
    what = r"^generator-1 serves version and checksum \(2, 'damaged'\), not 2, checksum: the hand-over .* went wrong$"
    with pytest.raises(RunError, match=what):
        dispatcher.hand_over(weights(2), until_served=waits)
        dispatcher.receive(ticket)
    (folders[0] / "wait").unlink()


@pytest.mark.parametrize("dispatcher", [1.0], indirect=True)
def test_a_wait_that_is_too_long_says_for_what(dispatcher: Dispatcher, folders: Sequence[Path]) -> None:
    (folders[1] / "wait").touch()
    ticket = exact_ticket(prompts(6), SPEC, generators=2)
    dispatcher.send(ticket)
    with pytest.raises(RunError, match="^waited 1 s for rollouts of 3 prompts from generator-1; see"):
        dispatcher.receive(ticket)
    with pytest.raises(RunError, match="^waited 1 s"):
        dispatcher.send(free(1))
    (folders[1] / "wait").unlink()
