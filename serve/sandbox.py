"""Killable processes for work whose cost a request decides: reading an image, checking a schema, checking an answer.

    Sandbox.run ──► a thread for each worker ──pipe──► `python -P -m serve.sandbox FD MIB`

A job that overruns, or whose caller is cancelled, is killed with its process; a new process takes the next job. Workers
are plain subprocesses, so nothing of the parent (threads, locks, Ray) is forked into them; they import only what a job
names, have a bound on memory, and end with their parent. What they send back is JSON and never unpickled: a worker that
an input has taken over cannot run code in its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

START_S = 60.0  # to start and to import what the job names; on a cold disk that takes seconds
LARGEST_RESULT = 64 << 20  # bytes
LARGE = 256 << 10  # bytes of one argument
SHORT_S = 0.2
LONG_JOBS = 3
ORPHAN_GRACE_S = 10.0
LONG_NICENESS = 15  # as Ray starts its workers: a long job and a model share the cores fairly
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TZ")


class SandboxError(RuntimeError):
    """The worker died, ran out of memory, or the function raised something that no caller expects."""


class Sandbox:
    """At most `workers` jobs at once in each of two lanes, the others in the order in which they came. A job with a
    large argument goes into the lane of large ones, as what costs much is mostly large. A job that takes longer than
    `SHORT_S` makes room for another, up to `LONG_JOBS` times as many, and one that has had a processor for as long gets
    a lower priority: slow ones do not hold up quick ones.

    Processes start with the first jobs, and `workers` of them stay. Each may have `memory_mib` of address space.
    """

    def __init__(self, workers: int = 2, memory_mib: int = 1024):
        self._workers, self._memory_mib = workers, memory_mib
        self._lanes = {is_large: _Lane(workers) for is_large in (False, True)}
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._closed = False

    async def run(self, function: str, *args: Any, deadline_s: float, processor_s: float = math.inf) -> Any:
        """The result of "module:function" for these arguments, as JSON has it: a tuple comes back as a list.

        `deadline_s` counts from the function's start, not while the job waits for a worker; `processor_s` counts the
        time that a processor works on it, whatever else the machine does. Raises TimeoutError when one is over, what
        the function raises if that is a ValueError or a Refusal, SandboxError for everything else.
        """
        lane = self._lanes[any(isinstance(arg, bytes | str) and len(arg) > LARGE for arg in args)]
        job = _Job(function, args, deadline_s, processor_s)
        try:
            return await asyncio.wrap_future(lane.threads.submit(self._work, job, lane.room))
        except asyncio.CancelledError:
            job.cancel()
            raise

    def close(self) -> None:
        """End the workers. Jobs under way end with SandboxError."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()
        for lane in self._lanes.values():
            lane.threads.shutdown(wait=False, cancel_futures=True)

    def _work(self, job: _Job, room: threading.Semaphore) -> Any:
        job.room = room
        room.acquire()
        try:
            while not job.cancelled:
                worker, warm = self._take()
                try:
                    job.begin(worker)
                    kind, content = worker.work(job)
                    return _outcome(kind, content)
                except _NotStarted as error:
                    if not warm or job.cancelled:  # a warm one may have died idle: a new one is tried
                        raise SandboxError(str(error)) from None
                finally:
                    job.end()
                    self._give_back(worker, worker.fit and not job.cancelled)
            raise SandboxError("nobody waits for it")
        finally:
            job.make_room()

    def _take(self) -> tuple[_Worker, bool]:
        """A worker, and whether it was there already."""
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        return _Worker(self._memory_mib), False

    def _give_back(self, worker: _Worker, reusable: bool) -> None:
        with self._lock:
            if reusable and not self._closed and len(self._idle) < self._workers:
                self._idle.append(worker)
                return
        worker.kill()


class _Lane:
    """Jobs that wait for each other."""

    def __init__(self, workers: int):
        self.threads = ThreadPoolExecutor(workers * (1 + LONG_JOBS), thread_name_prefix="sandbox")
        self.room = threading.Semaphore(workers)


class _NotStarted(Exception):
    """The process ended before it began the job."""


class _Job:
    def __init__(self, function: str, args: tuple[Any, ...], deadline_s: float, processor_s: float):
        self.function, self.args, self.deadline_s, self.processor_s = function, args, deadline_s, processor_s
        self.cancelled = False
        self.room: threading.Semaphore | None = None
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def begin(self, worker: _Worker) -> None:
        with self._lock:
            self._worker = worker
            if self.cancelled:
                worker.end()

    def end(self) -> None:
        with self._lock:
            self._worker = None

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            if self._worker:
                self._worker.end()

    def make_room(self) -> None:
        """Another may begin."""
        room, self.room = self.room, None
        if room:
            room.release()


class _Worker:
    """The parent's side of one process. One thread uses it at a time; any thread may `end` it."""

    def __init__(self, memory_mib: int):
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "serve.sandbox", str(theirs.fileno()), str(memory_mib)],
            stdin=subprocess.DEVNULL,
            env=_environment(),
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is the parent's alone
        )
        theirs.close()
        self.fit = False  # for another job

    def work(self, job: _Job) -> tuple[str, Any]:
        """What the worker sends: ("result", value), or an error by its kind. Raises TimeoutError."""
        self.fit = False
        try:
            self.connection.send((job.function, job.args, job.deadline_s, job.processor_s))
            if not self.connection.poll(START_S):
                raise _NotStarted(f"a sandbox worker did not start within {START_S:g} s")
            self._receive()
        except (EOFError, OSError):
            raise _NotStarted("a sandbox worker ended before it began") from None
        ends, before = time.monotonic() + job.deadline_s, self._processor_s()
        while not self.connection.poll(max(0.0, min(SHORT_S, ends - time.monotonic()))):
            if time.monotonic() >= ends:
                raise TimeoutError(f"{job.function} took more than {job.deadline_s:g} s")
            job.make_room()
            if self._processor_s() - before > SHORT_S:
                with contextlib.suppress(ProcessLookupError):  # it was killed: nobody waits for it
                    self._set_niceness(max(LONG_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
        try:
            kind, content = self._receive()
        except (EOFError, OSError):
            self.end()
            if self.process.wait() == -signal.SIGPROF:
                raise TimeoutError(f"{job.function} took more than {job.processor_s:g} s of a processor") from None
            return "ended", f"{job.function}: the sandbox worker died"
        with contextlib.suppress(ProcessLookupError):
            self.fit = kind != "ended" and self._set_niceness(os.getpriority(os.PRIO_PROCESS, 0))
        return kind, content

    def _processor_s(self) -> float:
        """Seconds that the process has had so far; 0 if it is gone."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _set_niceness(self, niceness: int) -> bool:
        """Whether it has it; only a privileged process may lower one."""
        if os.getpriority(os.PRIO_PROCESS, self.process.pid) != niceness:
            try:
                os.setpriority(os.PRIO_PROCESS, self.process.pid, niceness)
            except PermissionError:
                return False
        return True

    def _receive(self) -> list[Any]:
        return json.loads(self.connection.recv_bytes(LARGEST_RESULT))

    def end(self) -> None:
        """Whoever reads from it notices."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        self.end()
        self.process.wait()
        self.connection.close()


def _outcome(kind: str, content: Any) -> Any:
    if kind == "result":
        return content
    if kind == "ValueError":
        raise ValueError(content)
    if kind == "Refusal":
        from serve.errors import Refusal

        raise Refusal(*content)
    raise SandboxError(content)


def _environment() -> dict[str, str]:
    """What can be imported here, can be there; no variable of the parent's that may hold a secret."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Take jobs from a pipe until the parent closes it or is gone."""
    connection, memory_bytes = Connection(int(sys.argv[1])), int(sys.argv[2]) << 20
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    going = True
    while going:
        try:
            function, args, deadline_s, processor_s = connection.recv()
            module, _, name = function.partition(":")
            called = getattr(importlib.import_module(module), name)
            _silence()
            connection.send_bytes(b'["started", null]')
            # The parent kills what overruns. If the parent was killed, the kernel's alarm does: by default it ends the
            # process, also in C code that never yields.
            signal.setitimer(signal.ITIMER_REAL, deadline_s + ORPHAN_GRACE_S)
            signal.setitimer(signal.ITIMER_PROF, processor_s if processor_s < math.inf else 0)
            answer, going = _answer(called, args)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(answer)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _silence() -> None:
    """What a library prints or warns of may hold parts of the request; a start that fails may say why."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _answer(function: Any, args: tuple[Any, ...]) -> tuple[bytes, bool]:
    """The message, and whether this process is fit for another job."""
    try:
        return json.dumps(["result", function(*args)]).encode(), True
    except ValueError as error:
        return json.dumps(["ValueError", str(error)]).encode(), True
    except MemoryError:
        return json.dumps(["ended", "it takes too much memory"]).encode(), False
    except Exception as error:
        errors = sys.modules.get("serve.errors")
        if errors and isinstance(error, errors.Refusal):
            return json.dumps(["Refusal", error.args]).encode(), True
        return json.dumps(["error", type(error).__name__]).encode(), True  # its message may hold texts of the request


if __name__ == "__main__":
    main()
