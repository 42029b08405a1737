"""Runs verifiers in processes that can be killed: no text can hang, crash or slow down anything but itself.

    Prompt, Rollout ──► items ──chunks──► workers ──one message for each verdict──► Verdict, in rollout order

The three outcomes: `scored` and `invalid` are the verifier's word; `failed` is ours (it raised, overran,
died, or returned something else than a score). A failed verdict's reward is 0.0 and means nothing.

The pool knows rows, clocks and processes. It must not know what a verifier does, nor who called. Workers
are plain subprocesses and not `multiprocessing` children: nothing of the parent is forked into them (its
threads, its locks, Ray), and its `__main__` is not run again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from multiprocessing.connection import Pipe, wait
from typing import Any

import pyarrow as pa

from srl_rlvr import records
from srl_rlvr.errors import InputError, RunError
from srl_rlvr.verifiers import check_name
from srl_rlvr.verifiers.worker import Item, Outcome

LARGEST_CHUNK = 64  # items for one trip through a pipe: a similarity takes less time than the trip
CHUNKS_PER_WORKER = 4  # at least, so that one slow chunk does not leave the other workers idle
LOAD_DEADLINE_S = 120.0  # a worker's start, or the imports of its chunk; on a cold disk sympy alone takes many seconds
FALSE_STARTS_ALLOWED = 3  # in a row; then it is not bad luck
EXIT_WAIT_S = 5.0


class VerifierPool:
    """`workers` processes, each item of which has `deadline_s` seconds from its own start.

    What an item imports for the first time does not count. Workers start at once, in the background, and
    exit when the pool is closed or its process ends. Safe to call from several threads, one batch at a time.
    `own` are the user's verifiers ("package.module:function") that prompts may name beside the built-in ones.
    """

    def __init__(self, workers: int, deadline_s: float, own: Collection[str] = ()):
        if workers < 1 or not 0 < deadline_s < math.inf:
            raise InputError(f"verifier pool: {workers} workers and a deadline of {deadline_s} s; both must be above 0")
        self._deadline_s = deadline_s
        self._own = tuple(own)
        self._lock = threading.Lock()
        self._closed = False
        self._replaced = 0
        self._timeouts = 0
        self._false_starts = 0
        self._workers = [_Worker(deadline_s, self._own) for _ in range(workers)]

    def score(self, prompts: pa.Table, rollouts: pa.Table) -> pa.Table:
        """One Verdict for each Rollout, in their order.

        Raises RecordError for tables that do not hold to their records or do not fit together, InputError
        for a verifier or metadata that the run was set up with wrongly, RunError where workers cannot start.
        """
        items = _items(records.check("Prompt", prompts), records.check("Rollout", rollouts), self._own)
        with self._lock:
            if self._closed:
                raise RunError("verifier pool: it is closed")
            outcomes = self._run(items)
        columns = ("outcome", "reward", "components", "detail")
        keys = rollouts.select(["prompt_id", "sample_index"]).to_pylist()
        rows = zip(keys, outcomes, strict=True)
        return records.build("Verdict", [key | dict(zip(columns, outcome, strict=True)) for key, outcome in rows])

    def health(self) -> dict[str, int]:
        """How many workers live, how many were replaced so far, how many items overran."""
        alive = sum(worker.process.poll() is None for worker in self._workers)
        return {"alive": alive, "replaced": self._replaced, "timeouts": self._timeouts}

    def close(self) -> None:
        """Ends the workers; waits for a batch that is under way. May be called twice."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, items: Sequence[Item]) -> list[Outcome]:
        chunk_size = math.ceil(len(items) / (len(self._workers) * CHUNKS_PER_WORKER))
        chunk_size = min(LARGEST_CHUNK, max(1, chunk_size))
        waiting = deque(items)
        verdicts: dict[int, Outcome] = {}
        try:
            while len(verdicts) < len(items):
                for worker in self._workers:
                    if worker.ready and not worker.items and waiting:
                        worker.take([waiting.popleft() for _ in range(min(chunk_size, len(waiting)))])
                self._receive(waiting, verdicts)
                self._end_overdue(waiting, verdicts)
        except BaseException:
            # What the workers still hold belongs to no batch now.
            for index, worker in enumerate(self._workers):
                worker.kill()
                self._workers[index] = _Worker(self._deadline_s, self._own)
            raise
        return [verdicts[row] for row in range(len(items))]

    def _receive(self, waiting: deque[Item], verdicts: dict[int, Outcome]) -> None:
        """Waits for a message or the next deadline, then reads all that has come."""
        by_connection = {worker.connection: worker for worker in self._workers}
        next_deadline_s = min(worker.expires for worker in self._workers) - time.monotonic()
        for connection in wait(list(by_connection), timeout=min(max(0.0, next_deadline_s), LOAD_DEADLINE_S)):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                while worker.connection.poll():
                    self._handle(worker, worker.connection.recv(), verdicts)
            except (EOFError, OSError):
                self._replace(worker, waiting, verdicts)

    def _handle(self, worker: _Worker, message: tuple[Any, ...], verdicts: dict[int, Outcome]) -> None:
        kind, *content = message
        if kind == "ready":
            worker.ready, worker.expires = True, math.inf
        elif kind == "started":
            worker.running, worker.expires = True, time.monotonic() + self._deadline_s
            self._false_starts = 0
        elif kind == "verdict":
            row, *outcome = content
            worker.items.popleft()
            verdicts[row] = (outcome[0], outcome[1], outcome[2], outcome[3])
            worker.running = bool(worker.items)
            worker.expires = time.monotonic() + self._deadline_s if worker.running else math.inf
        else:
            raise InputError(content[0])

    def _end_overdue(self, waiting: deque[Item], verdicts: dict[int, Outcome]) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            # A message that came while this process was busy is in time.
            if worker.expires <= now and not worker.connection.poll():
                self._replace(worker, waiting, verdicts, overdue=True)

    def _replace(
        self, worker: _Worker, waiting: deque[Item], verdicts: dict[int, Outcome], overdue: bool = False
    ) -> None:
        """Ends the worker. The item it was at has failed and is not tried again; those behind it go to others."""
        exit_code = worker.kill() if overdue else worker.exit_code()
        if worker.running:
            timed_out = overdue or exit_code == -signal.SIGALRM
            self._timeouts += timed_out
            detail = f"timed out after {self._deadline_s:g} s" if timed_out else f"worker died (exit code {exit_code})"
            verdicts[worker.items.popleft()[0]] = (records.FAILED, 0.0, "{}", detail)
        elif worker.items or not worker.ready:
            self._false_starts += 1
        waiting.extendleft(reversed(worker.items))
        self._replaced += 1
        self._workers[self._workers.index(worker)] = _Worker(self._deadline_s, self._own)
        if self._false_starts >= FALSE_STARTS_ALLOWED:
            names = sorted({item[1] for item in worker.items})
            what = f"loading verifier {', '.join(names)}" if names else "starting a verifier worker"
            how = f"took over {LOAD_DEADLINE_S:g} s" if overdue else f"ended its process (exit code {exit_code})"
            raise RunError(f"{what} {how} {FALSE_STARTS_ALLOWED} times in a row; its own words are on stderr")


class _Worker:
    """The pool's side of one process. `items` are those it holds, the one it is at first."""

    def __init__(self, deadline_s: float, own: Sequence[str]):
        self.connection, theirs = Pipe()
        module = "srl_rlvr.verifiers.worker"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(deadline_s), *own],
            stdin=subprocess.DEVNULL,
            env=_environment(),
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is the parent's alone; what a verifier starts dies with it
        )
        theirs.close()
        self.items: deque[Item] = deque()
        self.ready = self.running = False
        self.expires = time.monotonic() + LOAD_DEADLINE_S

    def take(self, chunk: list[Item]) -> None:
        self.items = deque(chunk)
        self.expires = time.monotonic() + LOAD_DEADLINE_S
        with contextlib.suppress(OSError):  # it died idle: reading from it will tell
            self.connection.send(chunk)

    def kill(self) -> int:
        """Ends the process and all that it started; returns its exit code."""
        self.connection.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def exit_code(self) -> int:
        """The exit code of a process that has closed its end of the pipe."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its files and lives on
            self.process.wait(EXIT_WAIT_S)
        return self.kill()


def _environment() -> dict[str, str]:
    """The parent's, so that whatever it can import, the worker can; one thread each; the same hashes each time."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def _items(prompts: pa.Table, rollouts: pa.Table, own: Collection[str]) -> list[Item]:
    columns = (prompts[name].to_pylist() for name in ("id", "verifier", "reference", "metadata"))
    by_id: dict[str, tuple[str, str, str]] = {}
    for prompt_id, verifier, reference, metadata in zip(*columns, strict=True):
        if prompt_id in by_id:
            raise records.RecordError(f"Prompt table: id '{prompt_id}' stands twice")
        check_name(verifier, own)  # a user's own is imported by the workers only
        _check_metadata(prompt_id, metadata)
        by_id[prompt_id] = verifier, reference, metadata
    columns = (rollouts[name].to_pylist() for name in ("prompt_id", "text", "finish_reason"))
    items = []
    for row, (prompt_id, text, finish_reason) in enumerate(zip(*columns, strict=True)):
        if prompt_id not in by_id:
            raise records.RecordError(f"Rollout table: row {row}: no prompt has the id '{prompt_id}'")
        verifier, reference, metadata = by_id[prompt_id]
        items.append((row, verifier, text, reference, metadata, finish_reason))
    return items


def _check_metadata(prompt_id: str, metadata: str) -> None:
    try:
        is_object = isinstance(json.loads(metadata), dict)
    except json.JSONDecodeError:
        is_object = False
    if not is_object:
        raise records.RecordError(f"Prompt table: id '{prompt_id}': metadata is not a JSON object: {metadata[:60]!r}")
