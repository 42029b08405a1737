"""One run at a time in a folder: a lock file that names its holder. Knows files and processes only.

The file exists as long as it is held, so it works on shared storage, too. The next process on the same machine takes
over from a holder that has died.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLock, Timeout

from srl_rlvr.errors import InputError

NAME = ".lock"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder `out`, which is created if it is missing, and removed again if nothing was written into it.

    Raises InputError if another process holds it, or if `out` cannot be written.
    """
    is_new = not out.exists()
    lock = SoftFileLock(out / NAME, thread_local=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"{out} is in use by {_holder(out / NAME)}: wait until it ends, or name another folder by --out (if that "
            f"machine has died, delete {out / NAME})"
        ) from None
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; name another folder by --out") from None
    try:
        yield
    finally:
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):  # it was deleted meanwhile, or is not empty
                out.rmdir()


def _holder(path: Path) -> str:
    """As filelock writes it: the process, then its host."""
    with contextlib.suppress(OSError, ValueError):
        process, host, *_ = path.read_text().splitlines()
        return f"process {process} on {host}"
    return "another process"
