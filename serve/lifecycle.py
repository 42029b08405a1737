"""How `srl-rlvr serve` ends: when it is told to, when Ray ends under it, and with no process of its own left.

It knows neither models nor the gateway.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_CHILD_SUBREAPER = 36
_LOOKED_EVERY_S = 0.5
_ENDS_IN_S = 5.0  # of a process that is asked to end, before it is killed
_AT_ONCE_S = 1.0  # the same, when nobody wants to wait
_CLUSTER_AWAY_S = 30.0  # a head that restarts is back by then


class Lifecycle:
    """A context in the main thread. While the command starts, the first signal ends it; while it serves, the first one
    calls what `serving` was given and the second one ends it. Whatever it started is gone when the context is left."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._ending = threading.Event()  # from here on Ray's processes may end
        self._stop: Callable[[], None] | None = None

    def __enter__(self) -> Lifecycle:
        # Processes whose parent dies (engines of a killed replica) become children of this one, and can be found.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        # Signals are read from a socket by a thread: the main one may be inside Ray, where no handler would run.
        self._signals, wakes = socket.socketpair()
        wakes.setblocking(False)
        self._wakes = wakes
        self.heed_signals()
        threading.Thread(target=self._heed, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ending.set()
        end_processes(_ENDS_IN_S)

    def heed_signals(self) -> None:
        """Once more after Ray has started, which puts handlers of its own."""
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)

    def serving(self, stop: Callable[[], None]) -> None:
        """From now on a signal calls `stop` instead of ending the command."""
        self._stop = stop

    def ray_may_end(self) -> None:
        """Serving is over: from now on nobody minds if Ray's processes end."""
        self._ending.set()

    def watch_ray(self, where: str) -> None:
        """End the command with one line if a process of the local Ray ends; `where` names the folder of its logs."""
        names = ("gcs_server", "raylet")
        watched = [child for child in psutil.Process().children() if child.name() in names]

        def watch() -> None:
            while not self._ending.wait(_LOOKED_EVERY_S):
                for process in watched:
                    if not _alive(process) and not self._ending.is_set():
                        self._fail(f"Ray's {process.name() if process.is_running() else 'process'} "
                                   f"(pid {process.pid}) ended; its logs are in {where}")  # fmt: skip

        threading.Thread(target=watch, daemon=True).start()

    def watch_cluster(self, address: str) -> None:
        """End the command with one line if the head of the cluster that it joined is away for long."""
        host, _, port = address.rpartition(":")

        def watch() -> None:
            seen = time.monotonic()
            while not self._ending.wait(_LOOKED_EVERY_S):
                with contextlib.suppress(OSError):
                    socket.create_connection((host.strip("[]"), int(port)), 2).close()
                    seen = time.monotonic()
                if time.monotonic() - seen > _CLUSTER_AWAY_S:
                    self._fail(f"the Ray cluster at {address} has not answered for {_CLUSTER_AWAY_S:.0f} s")

        threading.Thread(target=watch, daemon=True).start()

    def _heed(self) -> None:
        while True:
            number = self._signals.recv(1)[0]
            if number not in _SIGNALS:
                continue
            if self._stop is None:
                print("stopping: not everything had started", flush=True)
                self._end_now(128 + number)
            if self.stopping.is_set():
                print("ended at once", flush=True)
                self._end_now(128 + number)
            print("stopping: what is being answered is finished (once more ends at once)", flush=True)
            self.stopping.set()
            self._stop()

    def _fail(self, why: str) -> None:
        print(f"error: {why}", file=sys.stderr, flush=True)
        self._end_now(1)

    def _end_now(self, code: int) -> None:
        """From any thread, whatever the others do: Ray's own ways to end wait for what may be gone."""
        self._ending.set()
        end_processes(_AT_ONCE_S)
        os._exit(code)


def end_processes(patience_s: float) -> None:
    """End whatever this process started, and what that started: they are asked first, and then killed."""
    me = psutil.Process()
    asked = me.children(recursive=True)
    for process in asked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(asked, timeout=patience_s)
    for _ in range(5):  # one that is killed may have started another meanwhile
        left = [process for process in me.children(recursive=True) if _alive(process)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if not left:
            return
        psutil.wait_procs(left, timeout=1)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
