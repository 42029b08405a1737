"""One run at a time in a folder: a lock file that names its holder.

On one machine the kernel's file lock decides; it ends with the process that holds it. Between machines that share the
folder the file's age decides: its holder renews it as long as it lives. Knows files and processes only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from srl_rlvr.errors import InputError

NAME = ".lock"
_RENEW_EVERY_S = 15.0
# A holder on another machine that has not renewed the file for this long is dead.
_STALE_AFTER_S = 120.0
# A process that has just created the file writes its name into it within this time.
_WRITE_DEADLINE_S = 1.0


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder `out`, which is created if it is missing, and removed again if nothing was written into it.

    Raises InputError if another process that is alive holds it, or if `out` cannot be written.
    """
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = _acquire(out)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; name another folder by --out") from None
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(out / NAME, ended), name="folder lock", daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        with contextlib.suppress(OSError):  # the folder was deleted meanwhile, or is not empty
            if _holder(lock).get("pid") == os.getpid():  # not taken over while this process was suspended
                (out / NAME).unlink(missing_ok=True)
            if is_new:
                out.rmdir()
        os.close(lock)


def _acquire(out: Path) -> int:
    """The open lock file, which holds the kernel's lock, too, if the file system has such locks."""
    path = out / NAME
    while True:
        try:
            lock = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
            created = True
        except FileExistsError:
            try:
                lock = os.open(path, os.O_RDWR)
            except FileNotFoundError:  # its holder ended in between
                continue
            created = False
        try:
            if not created:
                _check_free(out, path, lock)
            os.ftruncate(lock, 0)
            os.pwrite(lock, json.dumps(_myself()).encode(), 0)
            # Whoever looks at a new file holds the kernel's lock for a moment.
            if not _kernel_lock(lock, wait_s=_WRITE_DEADLINE_S):
                raise _in_use(out, {})
            if _is_at(path, lock):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _check_free(out: Path, path: Path, lock: int) -> None:
    """Raises InputError if the process that wrote the file is alive; else the kernel's lock is ours."""
    ours = _kernel_lock(lock)
    holder = _holder(lock)
    if not ours or _is_alive(holder, path, lock):
        raise _in_use(out, holder)


def _in_use(out: Path, holder: dict[str, Any]) -> InputError:
    who = "process {pid} on {host}, started at {since}".format(**holder) if holder else "another process"
    elsewhere = holder and holder["host"] != socket.gethostname()
    hint = f" (if that machine died, try again after {_STALE_AFTER_S:.0f} s)" if elsewhere else ""
    return InputError(f"{out} is in use by {who}: wait until it ends, or name another folder by --out{hint}")


def _kernel_lock(lock: int, wait_s: float = 0.0) -> bool:
    """False if another process has it. True, too, on a file system without such locks."""
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.01)
        except OSError:
            return True
        else:
            return True


def _holder(lock: int) -> dict[str, Any]:
    """Empty if the process that created the file died before it wrote its name."""
    end = time.monotonic() + _WRITE_DEADLINE_S
    while time.monotonic() < end:
        with contextlib.suppress(ValueError):
            found = json.loads(os.pread(lock, 4096, 0))
            if isinstance(found, dict) and {"pid", "host", "started", "since"} <= found.keys():
                return found
        time.sleep(0.05)
    return {}


def _is_alive(holder: dict[str, Any], path: Path, lock: int) -> bool:
    if not holder:
        return False
    if holder["host"] != socket.gethostname():
        return _age_s(path, lock) < _STALE_AFTER_S
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 2
    except psutil.Error:
        return False


def _age_s(path: Path, lock: int) -> float:
    """Seconds since the holder renewed the file, by the clock of the file system: machines' clocks may differ."""
    probe = path.with_name(f"{NAME}-{socket.gethostname()}-{os.getpid()}")
    probe.touch()
    try:
        return probe.stat().st_mtime - os.fstat(lock).st_mtime
    finally:
        probe.unlink()


def _myself() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": psutil.Process().create_time(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _is_at(path: Path, lock: int) -> bool:
    """Whether the file that is locked is still the one that has this name."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _renew(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_RENEW_EVERY_S):
        with contextlib.suppress(OSError):  # the next one may succeed
            os.utime(path)
