"""Errors of waiting for an actor, in a user's words."""

from __future__ import annotations

import asyncio

import pytest
import ray.exceptions

from actors import dispatcher
from srl_rlvr.errors import InputError, RunError


def test_a_wait_that_is_too_long_names_what_it_waited_for_and_its_own_key() -> None:
    async def never() -> None:
        await asyncio.sleep(60)

    for key in ("engine.call_deadline_s", "learner.start_deadline_s"):
        with pytest.raises(RunError, match="waited 0 s for the rollouts.*--resume") as caught:
            asyncio.run(dispatcher.wait(never(), 0.01, "the rollouts", key))
        assert key in str(caught.value) and "\n" not in str(caught.value)


def died_at_start(last: str) -> ray.exceptions.ActorDiedError:
    """As Ray raises it: the traceback of the actor's `__init__` is in the text."""
    error = ray.exceptions.ActorDiedError()
    error.error_msg = f"The actor died because of an error raised in its creation task,\n  File x\n{last}"
    error._actor_init_failed = True
    return error


def test_an_engine_that_cannot_start_is_one_line() -> None:
    with pytest.raises(InputError, match="^no such model$"), dispatcher.explained(9, "generator-0 to start", "k"):
        raise died_at_start("srl_rlvr.errors.InputError: no such model")
    with pytest.raises(RunError) as caught, dispatcher.explained(9, "generator-0 to start", "k"):
        raise died_at_start("ValueError: something is wrong")
    assert str(caught.value).startswith("waited for generator-0 to start, and it failed: ValueError: something")
    for last in ("ValueError: too little memory", "RuntimeError: no room for the KV cache", "OutOfMemoryError: x"):
        with pytest.raises(RunError, match="engine.kv_cache_gib") as caught, dispatcher.explained(9, "it", "k"):
            raise died_at_start(last)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ray.exceptions.OutOfMemoryError("5 workers were killed: the node ran low on memory\nmore"), "kv_cache_gib"),
        (ray.exceptions.WorkerCrashedError(), "WorkerCrashedError"),
        (ray.exceptions.RuntimeEnvSetupError("no such file"), "RuntimeEnvSetupError"),
        (ray.exceptions.ActorDiedError(), "the actor died"),
        (ray.exceptions.GetTimeoutError("late"), "the.key"),
    ],
)
def test_whatever_ends_an_actor_is_one_line_of_a_failed_run(error: Exception, said: str) -> None:
    with pytest.raises(RunError, match="generator-0") as caught, dispatcher.explained(9, "generator-0", "the.key"):
        raise error
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [ray.exceptions.ActorUnavailableError, ray.exceptions.ObjectLostError])
def test_what_can_be_repaired_passes(kind: type[Exception]) -> None:
    error = kind.__new__(kind)
    with pytest.raises(kind), dispatcher.explained(9, "generator-0", "the.key"):
        raise error
