"""The learner's journal of commands, without Ray: who is told what, and what a checkpoint forgets."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from actors import learner
from srl_rlvr.errors import RunError


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "_LONG_POLL_S", 0.05)


def journal(workers: int = 1) -> Any:
    """The actor's class itself, with neither a training thread nor Ray."""
    made: Any = object.__new__(learner.Learner.__ray_metadata__.modified_class)  # type: ignore[attr-defined]
    made.spec = SimpleNamespace(workers=workers)
    made.entries, made.first, made.starts = [], 0, 0
    made.checkpoint = made.version = made.failure = None
    made.changed = asyncio.Condition()
    return made


def run(steps: Coroutine[Any, Any, None]) -> None:
    asyncio.run(steps)


async def answered(made: Any, command: str, **arguments: Any) -> Any:
    """A command and the answer of its only worker."""
    asked = asyncio.create_task(made.call(command, arguments))
    await asyncio.sleep(0)
    await made.done(made.first + len(made.entries) - 1, 0, f"{command}'s result", None)
    return await asked


def test_a_worker_that_is_behind_a_commit_is_told_to_start_anew() -> None:
    async def steps() -> None:
        made = journal()
        await answered(made, "update", n=0)
        saved = await answered(made, "save", folder="a")
        _, _, position = await made.join(0)  # a group that starts now replays from here
        await answered(made, "update", n=1)
        await made.commit(saved, "checkpoint-a")
        assert position == 0 and made.first == 2
        for behind in (0, 1):
            with pytest.raises(RunError, match="start anew"):
                await made.next(behind)
        assert (await made.next(2))[1] == {"n": 1}
        assert await made.join(0) == ("checkpoint-a", None, 2)

    run(steps())


def test_an_answered_entry_keeps_its_answer() -> None:
    async def steps() -> None:
        made = journal()
        saved = await answered(made, "save", folder="a")
        await made.done(saved, 0, None, "the folder has another name by now")  # as a replay of it would say
        assert made.entries[0].error is None
        await made.commit(saved, "checkpoint-a")
        assert (made.first, made.checkpoint, made.entries) == (1, "checkpoint-a", [])
        await made.done(saved, 0, None, "late")
        assert made.entries == []

    run(steps())


def test_a_checkpoint_is_that_of_its_own_save() -> None:
    async def steps() -> None:
        made = journal()
        first = await answered(made, "save", folder="a")
        await answered(made, "update", n=1)
        best = await answered(made, "save", folder="best")
        await answered(made, "update", n=2)
        await made.commit(first, "checkpoint-a")
        assert [entry.command for entry in made.entries] == ["update", "save", "update"]
        await made.commit(best, "checkpoint-b")
        assert [entry.arguments for entry in made.entries] == [{"n": 2}]
        await made.commit(first, "checkpoint-a")  # comes late, and changes nothing
        assert made.checkpoint == "checkpoint-b" and made.first == 3

    run(steps())


def test_an_entry_is_answered_by_all_workers_together() -> None:
    async def steps() -> None:
        made = journal(workers=2)
        asked = asyncio.create_task(made.call("update", {}))
        await asyncio.sleep(0)
        await made.done(0, 1, None, "out of memory")
        assert (await made.next(0))[2] is False
        await made.done(0, 0, 1.0, None)
        with pytest.raises(RunError, match="out of memory"):
            await asked
        assert await made.next(1) is None

    run(steps())


def test_what_leaves_the_policy_as_it_is_is_not_repeated_in_a_replay() -> None:
    assert {"save", "export", "save_model", "notices"} == set(learner._READ_ONLY)
    assert set(learner._READ_ONLY) < set(learner._COMMANDS)
