"""Kill parts of a running server: what do clients see, and how does it end if it cannot go on without that part?

    python benchmarks/serving_faults.py            each of five parts is killed once: 8 minutes at most
    python benchmarks/serving_faults.py --quick    a replica only

`srl-rlvr serve` with three tiny untrained models, and 16 clients that ask chat, stream, embeddings and route again and
again. SIGKILL is sent to the replica of the model that writes, to its engine's process (vLLM), to Ray Serve's
controller, to Ray's GCS and to its raylet. The first three have these figures:

- `failed`: requests that were not answered with 200, and by status, from the kill until nothing had failed for `CALM_S`
  seconds, or for `MOST_S` at most;
- `gap_s`: the longest time in which an endpoint gave no client a whole answer;
- `ready_s`: seconds from the kill until all endpoints answered and `/readyz` was 200, for good, neither with a silence
  of more than `SILENCE_S`; null if not within `MOST_S`.

Without the GCS or the raylet the command is to end: `ended_s` is when it did, `exit_code` its code, `left` how many of
its processes were there `LEFT_AFTER_S` later (they are ended then).
Prints the table as Markdown and one JSON line.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import _serving_clients as ordinary
import psutil
from _machine import tell
from _serving_clients import Asked, Clients, Server

MODELS = ("task_llm", "embeddings", "intent_router")
KINDS = ("chat", "stream", "embeddings", "route")
CLIENTS = 16
HEALED = ("replica", "engine", "controller")  # after which the server goes on
ENDING = ("gcs", "raylet")
LOADED_S = 5.0  # under load before the kill
CALM_S, SILENCE_S, MOST_S, LEFT_AFTER_S = 12.0, 8.0, 110.0, 8.0
Event = tuple[float, bool]  # when, and whether it was good
LINES = {  # how the command line of a part begins
    "replica": "ray::ServeReplica:task_llm",
    "engine": "VLLM::EngineCore",
    "controller": "ray::ServeController",
}
PROGRAMS = {"gcs": "gcs_server", "raylet": "raylet"}
COLUMNS = ("asked", "failed", "statuses", "gap_s", "ready_s", "ended_s", "exit_code", "left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as of_all:
        every = ordinary.models(Path(name))
        paths, engine = {kind: every[kind] for kind in MODELS}, "transformers" if quick else "auto"
        server: Server | None = None
        for what in HEALED[:1] if quick else HEALED:
            if server is None:
                server = of_all.enter_context(ordinary.serving(Path(name), paths, engine))
            found[what] = healed(server, what)
            if found[what]["ready_s"] is None:
                of_all.close()
                server = None
        of_all.close()
        for what in () if quick else ENDING:
            with ordinary.serving(Path(name), paths, engine) as server:
                found[what] = ending(server, what)
    print_table(found)
    figures = {f"{what}_{key}": found.get(what, {}).get(key) for what in (*HEALED, *ENDING) for key in COLUMNS}
    tell("serving_faults", figures, whole=not quick)


def healed(server: Server, what: str) -> dict[str, Any]:
    load = Clients(server.address, KINDS, CLIENTS).start()
    time.sleep(LOADED_S)
    with Readiness(server) as readiness:
        killed = kill(server, what)
        while True:
            now = time.monotonic()
            begun = [good_since(events, killed, now) for events in (*answers(load.asked), readiness.seen)]
            good = [at for at in begun if at is not None]
            over = now > killed + MOST_S or server.process.poll() is not None
            if over or (len(good) == len(begun) and now > max(good) + CALM_S):
                break
            time.sleep(0.5)
    after = since(load.stop(10.0), what, killed)
    return counted(after) | {
        "gap_s": round(max(gap([each for each in after if each.kind == kind], killed) for kind in KINDS), 1),
        "ready_s": None if over else round(max(good) - killed, 1),
    }


def ending(server: Server, what: str) -> dict[str, Any]:
    load = Clients(server.address, KINDS, CLIENTS).start()
    time.sleep(LOADED_S)
    mine = server.processes()
    killed, ended_s, exit_code = kill(server, what), None, None
    try:
        exit_code = server.process.wait(MOST_S)
        ended_s = round(time.monotonic() - killed, 1)
        time.sleep(LEFT_AFTER_S)
        left = [line for each in mine if (line := ordinary.command_line(each))]
    except psutil.TimeoutExpired:
        left = [line for each in (server.process, *mine) if (line := ordinary.command_line(each))]
    finally:
        asked = load.stop(1.0)
        ordinary.end(mine)
    for line in left:
        print(f"  left: {line[:80]}", file=sys.stderr)
    print(f"  last lines: {ordinary.tail(server.log)[-300:]}", file=sys.stderr)
    answered = [a for a in since(asked, what, killed) if a.ended < killed + (ended_s or MOST_S)]
    return counted(answered) | {"ended_s": ended_s, "exit_code": exit_code, "left": len(left)}


def kill(server: Server, what: str) -> float:
    """The time at which it was done."""
    parts = [process for process in server.processes() if is_part(process, what)]
    if not parts:
        raise SystemExit(f"error: the server has no process that is its {what}")
    parts[0].kill()
    return time.monotonic()


def is_part(process: psutil.Process, what: str) -> bool:
    if what in LINES:
        return ordinary.command_line(process).startswith(LINES[what])
    try:
        return os.path.basename(process.exe()) == PROGRAMS[what]
    except psutil.Error:
        return False


def since(asked: Sequence[Asked], what: str, killed: float) -> list[Asked]:
    """The requests that ended after the kill; what failed of them is printed."""
    after = [each for each in asked if each.ended > killed]
    print(f"{what}: {ordinary.statuses(after)}", file=sys.stderr)
    ordinary.print_failures(after)
    return after


def counted(asked: Sequence[Asked]) -> dict[str, Any]:
    failed = [each for each in asked if each.failed]
    return {"asked": len(asked), "failed": len(failed), "statuses": ordinary.statuses(failed)}


def answers(asked: Sequence[Asked]) -> list[list[Event]]:
    """Return the answers of each endpoint as events."""
    return [[(each.ended, not each.failed) for each in asked if each.kind == kind] for kind in KINDS]


def good_since(events: Sequence[Event], killed: float, now: float) -> float | None:
    """Since when there has been neither a failure nor silence, or None."""
    begun, last = None, killed
    for at, good in sorted(event for event in events if event[0] > killed):
        if not good or at > last + SILENCE_S:
            begun = None
        if good and begun is None:
            begun = at
        last = at
    return begun if now < last + SILENCE_S else None


def gap(asked: Sequence[Asked], killed: float) -> float:
    """The longest time without an answer that is whole, from the kill to the end of the last request."""
    times = [killed, *sorted(each.ended for each in asked if not each.failed)]
    times.append(max([killed, *(each.ended for each in asked)]))
    return max(later - earlier for earlier, later in pairwise(times))


class Readiness:
    """Asks `/readyz` twice a second."""

    def __init__(self, server: Server):
        self.server = server
        self.seen: list[Event] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Readiness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(0.5):
            ready = self.server.ready()
            self.seen.append((time.monotonic(), ready))


def print_table(found: dict[str, dict[str, Any]]) -> None:
    print(f"| killed | {' | '.join(COLUMNS)} |\n|{'---|' * (1 + len(COLUMNS))}")
    for what, of in found.items():
        cells = []
        for key in COLUMNS:
            value = of.get(key, "–")
            if key == "statuses":
                value = ", ".join(f"{count} × {status}" for status, count in value.items()) or "–"
            cells.append("not within the time" if value is None else str(value))
        print(f"| {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
