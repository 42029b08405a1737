"""Moves tasks through the actors while the pipeline does something else: generators sample, verifiers score.

`srl_rlvr.scheduling` decides; this room submits, waits and restarts. It runs on a thread of its own, one coroutine for
each task in flight, so that the next task is sent and the last one verified while the learner updates.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.exceptions

from srl_rlvr import records
from srl_rlvr.config import EngineConfig
from srl_rlvr.errors import InputError, RunError
from srl_rlvr.scheduling import Scheduler, Task, Ticket

_GENERATOR_TRIES = 3
_RESTART_POLL_S = 0.5
_STOP_DEADLINE_S = 10.0

# What the learner exports: [reference to the flat buffer], manifest.
Weights = tuple[list[Any], Any]


@dataclass
class _Watch:
    """Who waits for a ticket, and its times on the monotonic clock."""

    sent: float
    done: Future[None] = field(default_factory=Future)
    sampled: float = 0.0  # its last rollouts came
    verified: float = 0.0


class Dispatcher:
    """Drives generators and verifiers by a Scheduler. Public methods may be called from any one thread.

    A generator that dies is restarted (by Ray), is handed the newest weights, and what it held is sent out again. By
    the order of calls to an actor it is known which version each task is sampled with; another one shows a
    restart that nobody noticed. Whatever cannot be repaired ends every wait with its error.
    """

    def __init__(
        self, generators: Sequence[Any], verifiers: Sequence[Any], engine: EngineConfig, export: Callable[[], Any]
    ):
        self.weights: Weights | None = None
        self._generators = generators
        self._verifiers = itertools.cycle(verifiers)
        self._engine = engine
        self._export = export  # returns the reference to new Weights
        self._scheduler = Scheduler(len(generators))
        self._version = [0] * len(generators)  # that a task sent now is sampled with
        self._lives = [0] * len(generators)
        self._revivals: dict[int, asyncio.Task[None]] = {}
        self._open: dict[Ticket, _Watch] = {}
        self._received = 0.0  # when the last rollouts of those tickets came that were received
        self._failure: BaseException | None = None
        self._coroutines: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dispatcher", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        """Of the weights that the generators should serve; 0 are the base weights that they start with."""
        return self.weights[1].version if self.weights is not None else 0

    def send(self, ticket: Ticket) -> None:
        """Queue the ticket's tasks behind all that wait."""
        self._call(self._send(ticket))

    def receive(self, ticket: Ticket) -> dict[str, float]:
        """Block until every task of the ticket is sampled and verified; returns the seconds that each took.

        Seconds that an earlier ticket was sampled in count for that one alone.
        """
        watch = self._open[ticket]
        watch.done.result()
        del self._open[ticket]
        began = max(watch.sent, min(self._received, watch.sampled))
        self._received = max(self._received, watch.sampled)
        return {"sample_s": watch.sampled - began, "verify_s": watch.verified - watch.sampled}

    def hand_over(self, weights: Weights, until_served: bool) -> None:
        """Serve these weights from the next task on; each echo is checked, now (`until_served`) or when it comes."""
        self._call(self._hand_over(weights, until_served))

    def close(self) -> None:
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(_STOP_DEADLINE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_DEADLINE_S)

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _send(self, ticket: Ticket) -> None:
        self._raise_failure()
        self._open[ticket] = _Watch(time.monotonic())
        self._scheduler.send(ticket.tasks)
        self._assign()

    def _assign(self) -> None:
        for i, task in self._scheduler.assign():
            ref = self._generators[i].generate.remote(task.prompts, task.spec)
            self._start(self._run(task, i, ref, self._version[i], self._lives[i]))

    async def _run(self, task: Task, i: int, ref: Any, version: int, life: int) -> None:
        """The task's rollouts from generator i, then its verdicts."""
        what = f"rollouts of {task.prompts.num_rows} prompts from generator-{i}"
        ahead = len(self._scheduler.held(i))  # it waits for those before it, too
        rollouts = None
        with contextlib.suppress(ray.exceptions.ActorUnavailableError, ray.exceptions.ObjectLostError):
            rollouts = await wait(ref, ahead * self._engine.call_deadline_s, what)
        if life != self._lives[i]:
            return  # the generator died, and the task went back to the queue
        if rollouts is None or not _all_of_version(rollouts, version):
            self._bury(i)
            return
        self._scheduler.finished(i, task)
        self._assign()
        self._open[task.ticket].sampled = time.monotonic()
        verifier = next(self._verifiers)
        verdicts = await wait(verifier.score.remote(task.prompts, ref), self._engine.call_deadline_s, "verdicts")
        if task.ticket.answer(task, rollouts, verdicts):
            watch = self._open[task.ticket]
            watch.verified = time.monotonic()
            watch.done.set_result(None)

    async def _hand_over(self, weights: Weights, until_served: bool) -> None:
        self._raise_failure()
        self.weights = weights
        loads = [self._load(i) for i in range(len(self._generators))]
        if until_served:
            await asyncio.gather(*loads)
        else:
            for load in loads:
                self._start(load)

    async def _load(self, i: int) -> None:
        """Generator i serves the newest weights afterwards; one that is being revived gets them there."""
        if i not in self._revivals:
            life = self._lives[i]
            try:
                await self._load_once(i)
            except (ray.exceptions.ActorUnavailableError, ray.exceptions.ObjectLostError):
                if life == self._lives[i]:
                    self._bury(i)
        if i in self._revivals:
            await asyncio.shield(self._revivals[i])

    async def _load_once(self, i: int) -> None:
        """Raises RunError where the generator serves something else afterwards."""
        assert self.weights is not None
        (buffer,), manifest = self.weights
        self._version[i] = manifest.version
        ref = self._generators[i].load.remote(buffer, manifest)
        del buffer
        ahead = 1 + len(self._scheduler.held(i))
        served = await wait(
            ref, ahead * self._engine.call_deadline_s, f"generator-{i} to load version {manifest.version}"
        )
        if served != (manifest.version, manifest.checksum):
            raise RunError(
                f"generator-{i} serves version and checksum {served}, not {manifest.version}, {manifest.checksum}: "
                "the hand-over of weights went wrong"
            )

    def _bury(self, i: int) -> None:
        """Generator i died: what it held goes back to the front of the queue, and it is brought back."""
        self._lives[i] += 1
        self._version[i] = 0
        tasks = self._scheduler.died(i)
        if tasks and tasks[0].deaths >= _GENERATOR_TRIES:
            rows = tasks[0].prompts.num_rows
            raise RunError(f"generators died {_GENERATOR_TRIES} times over the same {rows} prompts, generator-{i} last")
        self._revivals[i] = self._start(self._revive(i))
        self._assign()

    async def _revive(self, i: int) -> None:
        """Wait for generator i to start again and hand it the newest weights, anew where their owner died, too."""
        for _ in range(_GENERATOR_TRIES):
            await self._await_restart(i)
            weights = self.weights
            try:
                while self._version[i] != self.version:
                    weights = self.weights
                    await self._load_once(i)
            except ray.exceptions.ActorUnavailableError:
                self._version[i] = 0
            except ray.exceptions.ObjectLostError:
                self._version[i] = 0
                if self.weights is weights:
                    self.weights = await wait(self._export(), self._engine.call_deadline_s, "the learner's export")
            else:
                del self._revivals[i]
                self._scheduler.revived(i)
                self._assign()
                return
        raise RunError(f"generator-{i} died {_GENERATOR_TRIES} times over loading version {self.version}")

    async def _await_restart(self, i: int) -> None:
        """Wait until generator i, which died, answers again: until then Ray turns every call away at once."""
        deadline_s, what = self._engine.start_deadline_s, f"generator-{i} to start again"
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            try:
                await wait(self._generators[i].health.remote(), deadline_s, what, "engine.start_deadline_s")
                return
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(_RESTART_POLL_S)
        raise RunError(
            f"generator-{i} died and did not start again within {deadline_s:.0f} s; see its log, or raise "
            "engine.start_deadline_s"
        )

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        self._coroutines.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._coroutines.discard(task)
        if not task.cancelled() and (error := task.exception()) and self._failure is None:
            self._failure = error
            for watch in self._open.values():
                if not watch.done.done():
                    watch.done.set_exception(error)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _stop(self) -> None:
        for task in self._coroutines:
            task.cancel()
        await asyncio.gather(*self._coroutines, return_exceptions=True)


def _all_of_version(rollouts: pa.Table, version: int) -> bool:
    found = pc.min_max(records.check("Rollout", rollouts)["policy_version"]).as_py()  # type: ignore[attr-defined]
    return found["min"] == found["max"] == version


async def wait(ref: Any, deadline_s: float, what: str, key: str = "engine.call_deadline_s") -> Any:
    """The value of a Ray reference. Raises RunError naming `what` was waited for, and the `key` of the deadline."""
    with explained(deadline_s, what, key):
        async with asyncio.timeout(deadline_s):
            return await ref


_MEMORY_HINT = "; free some memory, or change engine.kv_cache_gib, engine.max_running or model.max_context"
# The first line of Ray's message is enough, and some of its lines are long.
_LONGEST_REASON = 300
# Of what an actor's `__init__` raises Ray keeps the text alone.
_INPUT_ERROR = f"{InputError.__module__}.{InputError.__name__}: "


@contextlib.contextmanager
def explained(deadline_s: float, what: str, key: str) -> Iterator[None]:
    """Ray's errors in a user's words; those that can be repaired (unavailable actor, lost object) pass as they are."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError | RunError):
            raise error.cause from None
        if isinstance(error.cause, ray.exceptions.RayError):
            raise _in_words(error.cause, what) from error
        raise RunError(f"waited for {what}: {_named(error.cause)}") from error
    except TimeoutError:  # ray.get's and asyncio's
        raise RunError(
            f"waited {deadline_s:.0f} s for {what}; see `ray status` and the actor's log, or if it is only slow raise "
            f"{key} and go on with --resume"
        ) from None
    except ray.exceptions.RayError as error:
        found = _in_words(error, what)
        if found is error:
            raise
        raise found from error


def _in_words(error: ray.exceptions.RayError, what: str) -> Exception:
    """The error itself if it can be repaired."""
    if isinstance(error, ray.exceptions.ActorUnavailableError | ray.exceptions.ObjectLostError):
        return error
    if not isinstance(error, ray.exceptions.ActorDiedError):
        return RunError(f"waited for {what}: {_with_hint(_named(error))}")
    last = str(error).strip().splitlines()[-1]
    if error.actor_init_failed and last.startswith(_INPUT_ERROR):
        return InputError(last.removeprefix(_INPUT_ERROR))
    happened = "it failed" if error.actor_init_failed else "the actor died"
    return RunError(f"waited for {what}, and {happened}: {_with_hint(last)}")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _with_hint(reason: str) -> str:
    hint = _MEMORY_HINT if re.search(r"memory|kv cache", reason, re.IGNORECASE) else ""
    return reason[:_LONGEST_REASON] + hint
