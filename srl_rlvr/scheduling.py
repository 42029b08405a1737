"""Which task goes to which generator and when, what may be sent ahead, and whether a machine has the cores for that.

    batch ──tasks──► queue ──Scheduler.assign──► generators ──► answers, put together in the order of the prompts

It must not know Ray, clocks or torch: `actors.dispatcher` drives it with real actors, `benchmarks/simulate.py` in
virtual time. Every event costs O(1) for each task that it moves, however many generators there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from srl_rlvr import records
from srl_rlvr.config import RunConfig
from srl_rlvr.engines import SamplingSpec

# Tasks that one generator holds: the one that it samples, and one behind it that starts without the controller.
WINDOW = 2


def admits(batch: int, learned: int, max_staleness: int) -> bool:
    """Whether batch number `batch` of a stage may be sent out when `learned` batches of it were learned from.

    It is used when `batch` were: no more than `max_staleness` updates lie between its sampling and its use.
    """
    return batch - learned <= max_staleness


@dataclass(eq=False)
class Task:
    """What one generator is asked for at once: whole trunks with their groups."""

    ticket: Ticket
    index: int  # among the tasks of its ticket
    prompts: pa.Table
    spec: SamplingSpec
    pinned: int | None = None  # the one generator that may take it
    deaths: int = 0  # of generators that were sampling it


@dataclass(eq=False)
class Ticket:
    """Prompts on their way: the tasks that they were cut into, and the answers so far."""

    tasks: list[Task] = field(default_factory=list)
    answers: dict[int, tuple[pa.Table, pa.Table]] = field(default_factory=dict)  # task index: rollouts, verdicts

    def answer(self, task: Task, rollouts: pa.Table, verdicts: pa.Table) -> bool:
        """Note what came back of one task; returns whether it was the last."""
        self.answers[task.index] = rollouts, verdicts
        return len(self.answers) == len(self.tasks)

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """All rollouts and verdicts, in the order of the prompts. Once: the ticket lets go of its parts."""
        answers = [self.answers.pop(task.index) for task in self.tasks]
        self.tasks.clear()
        rollouts = records.concat("Rollout", [rollouts for rollouts, _ in answers])
        return rollouts, records.concat("Verdict", [verdicts for _, verdicts in answers])


def exact_ticket(prompts: pa.Table, spec: SamplingSpec, generators: int) -> Ticket:
    """One task for each generator, pinned to it: what is sampled then depends on nothing but weights and seed, of
    which each has its own."""
    starts = _trunk_starts(prompts)
    trunks = len(starts) - 1
    ticket = Ticket()
    for i in range(generators):
        first, end = starts[trunks * i // generators], starts[trunks * (i + 1) // generators]
        if end > first:
            index = len(ticket.tasks)
            ticket.tasks.append(Task(ticket, index, _rows(prompts, first, end), _seeded(spec, index), pinned=i))
    return ticket


def free_ticket(prompts: pa.Table, spec: SamplingSpec, generators: int, max_running: int) -> Ticket:
    """Tasks for whichever generator is free, each with a seed of its own.

    A task fills an engine (`max_running` sequences) unless the prompts, shared out, are fewer; a trunk stays whole
    in any case, so that its steps find their prefix in one engine's cache.
    """
    largest = max(1, min(max_running // spec.samples, -(-prompts.num_rows // generators)))
    starts = _trunk_starts(prompts)
    ticket = Ticket()
    first = 0
    for end, after in zip(starts[1:], [*starts[2:], None], strict=True):
        if after is None or after - first > largest:
            index = len(ticket.tasks)
            ticket.tasks.append(Task(ticket, index, _rows(prompts, first, end), _seeded(spec, index)))
            first = end
    return ticket


def _seeded(spec: SamplingSpec, index: int) -> SamplingSpec:
    return replace(spec, seed=(spec.seed + index) % 2**63)


def _trunk_starts(prompts: pa.Table) -> list[int]:
    """The first row of each trunk, and the end of the last."""
    trunk_ids = prompts["trunk_id"].to_pylist()
    return [i for i in range(len(trunk_ids)) if i == 0 or trunk_ids[i] != trunk_ids[i - 1]] + [len(trunk_ids)]


def _rows(prompts: pa.Table, first: int, end: int) -> pa.Table:
    """A copy: with a slice, the whole table behind it would travel."""
    return prompts.take(pa.array(range(first, end)))


class Scheduler:
    """The queue of tasks and what each generator holds.

    No generator is without a task while one waits that it may take. The least loaded comes first; a second task is
    put behind a running one only while more tasks wait than there are generators: with fewer, it might wait behind a
    slow task while another generator runs dry.
    """

    def __init__(self, generators: int, window: int = WINDOW):
        self._window = window
        self._queue: deque[Task] = deque()
        self._pinned: list[deque[Task]] = [deque() for _ in range(generators)]
        self._held: list[dict[Task, None]] = [{} for _ in range(generators)]  # in the order of sending
        # By number of tasks held: generators that live, the one that came to hold so many first at the front.
        self._alive: list[dict[int, None]] = [dict.fromkeys(range(generators)), *({} for _ in range(window))]
        self._generators_alive = generators
        self._touched: dict[int, None] = {}  # generators that may take a task pinned to them

    @property
    def waiting(self) -> int:
        return len(self._queue) + sum(map(len, self._pinned))

    def held(self, generator: int) -> list[Task]:
        """The tasks in flight there, in the order in which they were sent."""
        return list(self._held[generator])

    def send(self, tasks: Sequence[Task]) -> None:
        """Queue tasks behind all others."""
        for task in tasks:
            if task.pinned is None:
                self._queue.append(task)
            else:
                self._pinned[task.pinned].append(task)
                self._touched[task.pinned] = None

    def assign(self) -> list[tuple[int, Task]]:
        """(generator, task) of everything that is to be sent out now."""
        placed = []
        for generator in self._touched:
            while self._pinned[generator] and self._room(generator):
                placed.append(self._place(generator, self._pinned[generator].popleft()))
        self._touched.clear()
        while self._queue and (generator := self._next_free()) is not None:
            placed.append(self._place(generator, self._queue.popleft()))
        return placed

    def finished(self, generator: int, task: Task) -> None:
        """The generator sampled the task and has room for another."""
        held = self._held[generator]
        del self._alive[len(held)][generator], held[task]
        self._alive[len(held)][generator] = None
        if self._pinned[generator]:
            self._touched[generator] = None

    def died(self, generator: int) -> list[Task]:
        """What the generator held goes back to the front, in order; it gets nothing until it is `revived`."""
        held = self._held[generator]
        del self._alive[len(held)][generator]
        self._generators_alive -= 1
        tasks = list(held)
        held.clear()
        for task in reversed(tasks):
            (self._queue if task.pinned is None else self._pinned[generator]).appendleft(task)
        if tasks:
            tasks[0].deaths += 1
        return tasks

    def revived(self, generator: int) -> None:
        self._alive[0][generator] = None
        self._generators_alive += 1
        self._touched[generator] = None

    def _room(self, generator: int) -> bool:
        load = len(self._held[generator])
        return load < self._window and generator in self._alive[load]

    def _next_free(self) -> int | None:
        """The least loaded generator that should take one more of the queue."""
        loads = self._window if len(self._queue) > self._generators_alive else 1
        return next((next(iter(level)) for level in self._alive[:loads] if level), None)

    def _place(self, generator: int, task: Task) -> tuple[int, Task]:
        held = self._held[generator]
        del self._alive[len(held)][generator]
        held[task] = None
        self._alive[len(held)][generator] = None
        return generator, task


def plan(config: RunConfig, cores: int | None) -> tuple[RunConfig, str]:
    """The run as this machine should run it, and in one line what was changed and why ("" where nothing was).

    Engines and learner that compute on the same `cores` at the same time only take them from each other: a run without
    cores of its own for either side takes turns. Whole GPUs belong to one side, and on a cluster (`cores` is None) each
    has what Ray reserves for it; two fractions of a GPU are of the same one.
    """
    cluster, engine, learner = config.cluster, config.engine, config.learner
    if config.max_staleness and 0 < cluster.gpus_per_generator < 1 and 0 < cluster.gpus_per_learner < 1:
        remark = (
            f"max_staleness = {config.max_staleness} does not pay if sampling and learning share one GPU: they take "
            "turns; to overlap them, set cluster.gpus_per_generator and cluster.gpus_per_learner to 1 or more"
        )
        return config.model_copy(update={"max_staleness": 0}), remark
    if not config.max_staleness or cores is None or cluster.gpus_per_generator or cluster.gpus_per_learner:
        return config, ""
    threads = engine.threads * engine.generators + learner.threads * learner.workers
    if engine.threads and learner.threads and threads <= cores:
        return config, ""
    asked = f"they ask for {threads}" if engine.threads and learner.threads else "either side would take all of them"
    remark = (
        f"max_staleness = {config.max_staleness} does not pay where sampling and learning share {cores} cores "
        f"({asked}): they take turns; to overlap them, set engine.threads and learner.threads so that all generators "
        f"and workers together have at most {cores}"
    )
    return config.model_copy(update={"max_staleness": 0}), remark
