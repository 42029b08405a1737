"""How `srl-rlvr serve` ends: when it is told to, when Ray ends under it, and with no process of its own left.

It knows neither models nor the gateway.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

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
        self._in_loop = False  # an event loop runs in the main thread

    def __enter__(self) -> Lifecycle:
        # Processes whose parent dies (engines of a killed replica) become children of this one, and can be found.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._signals, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        self.heed_signals()
        threading.Thread(target=self._heed, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ending.set()
        end_processes(_ENDS_IN_S)

    def heed_signals(self) -> None:
        """Once more after Ray has started, which puts handlers of its own.

        A thread reads them from a socket: the main one may be inside Ray, where no handler runs.
        """
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def serve(self, run: Callable[[], Any], stop: Callable[[], None]) -> None:
        """Call `run`, which has an event loop of its own; a signal calls `stop`."""
        self._stop, self._in_loop = stop, True
        run()
        self._in_loop = False
        self.heed_signals()  # a loop has taken the socket's place

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

    def _handle(self, number: int, _: Any) -> None:
        if self._in_loop:
            self._signalled(number)

    def _heed(self) -> None:
        while True:
            number = self._signals.recv(1)[0]
            if number in _SIGNALS and not self._in_loop:
                self._signalled(number)

    def _signalled(self, number: int) -> None:
        if self._stop is None:
            _say("stopping: it was still starting")
            self._end_now(128 + number)
        elif self.stopping.is_set():
            _say("ended at once")
            self._end_now(128 + number)
        else:
            self.stopping.set()  # before anything is said: the next signal may come at once
            _say("stopping: what is being answered is finished (once more ends at once)")
            self._stop()

    def _fail(self, why: str) -> None:
        os.write(2, f"error: {why}\n".encode())
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Ray's own library goes on to say what it misses
        self._end_now(1)

    def _end_now(self, code: int) -> None:
        """From any thread, whatever the others do: Ray's own ways to end wait for what may be gone."""
        self._ending.set()
        end_processes(_AT_ONCE_S)
        os._exit(code)


class WithoutRaysErrors(io.TextIOBase):
    """A text stream that leaves out what Ray's thread of error messages prints: the log of a dead raylet, say."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name == "ray_listen_error_messages":
            return len(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


def _say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # a handler may have interrupted a print


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
