"""What the tests of the sandbox run in its workers."""

from __future__ import annotations

import os
import signal
import sys
import time


def echo(*values: object) -> object:
    return [os.getpid(), *values]


def sleep(path: str, seconds: float) -> int:
    """Writes its process id first."""
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(seconds)
    return os.getpid()


def sleep_over(path: str, seconds: float, _: bytes) -> int:
    return sleep(path, seconds)


def wrong(message: str) -> None:
    raise ValueError(message)


def refuse(message: str) -> None:
    from serve.errors import Refusal

    raise Refusal(413, message, param="image", retry_after=1.5)


def defect(text: str) -> None:
    raise KeyError(text)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def eat(mib: int) -> int:
    return len(bytearray(mib << 20))


def imported() -> list[str]:
    return [name for name in ("torch", "ray", "PIL", "jsonschema", "pydantic", "starlette") if name in sys.modules]


def secrets() -> list[str]:
    return [name for name in os.environ if "SECRET" in name]


def speak(text: str) -> None:
    os.write(1, text.encode())
    os.write(2, text.encode())


def work(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def niceness_after(processor_s: float) -> int:
    began = time.process_time()
    while time.process_time() - began < processor_s:
        pass
    return os.getpriority(os.PRIO_PROCESS, 0)
