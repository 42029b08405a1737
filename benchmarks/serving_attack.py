"""Measure ordinary clients of all endpoints: alone, and beside one attacker of each kind.

    python benchmarks/serving_attack.py            64 clients, two minutes with attackers, in turns: 6 minutes
    python benchmarks/serving_attack.py --quick    8 clients, a few seconds of either

`srl-rlvr serve` with one tiny untrained model of each type, and clients that ask chat, stream, embeddings, rerank,
route, extract, parse and vision again and again. The attackers (`_attackers.py`), none of whom has a key:

- large bodies: rerank requests that are joined to calls of more than 4 MiB, and one of 4.5 MiB;
- image chains: six TIFFs at once with 60,000 directories each;
- doubled schemas: a `oneOf` in which every alternative holds the next one twice, 25 times;
- many choices: `structured_outputs` with 40,000 texts;
- many prompts: 1,000 prompts with 16 answers of 400 tokens each;
- open paths: bodies of 20 MiB that do not end, a head of 100 MiB, slow heads and bodies, silence;
- large JSON: bodies of 20 MB that hold millions of values.

`failed_ordinary` counts ordinary requests of both turns that were not answered with 200 (extract and parse: or 422, as
the models are untrained), or not within `GRACE_S` after their turn's end. `p95_ratio` is the largest ratio of an
endpoint's 95th percentile with attackers to that without, `p95_ratio_all` that of all requests. Memory is the largest
resident size that was seen of the command with the workers it starts itself, and of one replica with its engine.
Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _serving_clients as ordinary
import psutil
from _machine import tell
from _serving_clients import KINDS, Asked, Clients, Server

HERE = Path(__file__).parent
GRACE_S = 20.0
REPLICA = "ray::ServeReplica:"
ALL = "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    clients, seconds, turns = (8, {False: 4.0, True: 4.0}, 1) if quick else (64, {False: 40.0, True: 60.0}, 2)
    asked: dict[bool, list[Asked]] = {False: [], True: []}
    answers: list[dict[str, dict[str, int]]] = []
    with tempfile.TemporaryDirectory() as name:
        paths = ordinary.models(Path(name))
        with ordinary.serving(Path(name), paths, "transformers" if quick else "auto") as server:
            turn(server, clients, 3.0, None)  # every model has answered once
            with Memory(server) as memory:
                for attacked in [False, True] * turns:
                    asked[attacked] += turn(server, clients, seconds[attacked], answers if attacked else None)
                    if not server.ready_within(60):
                        print("the server was not ready a minute after this turn", file=sys.stderr)
    tell("serving_attack", report(asked, answers) | memory.peaks(), whole=not quick)


def turn(server: Server, count: int, seconds: float, answers: list[dict[str, dict[str, int]]] | None) -> list[Asked]:
    """The ordinary requests of this time; with attackers if there is a list for what these are answered."""
    load = Clients(server.address, tuple(KINDS), count).start()
    if answers is None:
        time.sleep(seconds)
    else:
        spec = json.dumps({"port": int(server.address.rsplit(":", 1)[1]), "seconds": seconds})
        command = [sys.executable, str(HERE / "_attackers.py"), spec]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=seconds + 60).stdout
        answers.append(json.loads(said))
    found = load.stop(GRACE_S)
    print(f"{'with' if answers is not None else 'without'} attackers: {ordinary.statuses(found)}", file=sys.stderr)
    ordinary.print_failures(found)
    return found


def report(asked: dict[bool, list[Asked]], answers: list[dict[str, dict[str, int]]]) -> dict[str, Any]:
    """Prints what attackers were answered and what everyone else was; returns the figures."""
    print(f"{'attacker':<18}answers, by turn")
    for kind in sorted({kind for of in answers for kind in of}):
        print(f"{kind:<18}{'; '.join(str(of.get(kind, {})) for of in answers)}")
    print(f"\n{'':<12}{'without attackers':>30}{'with attackers':>30}")
    print(f"{'endpoint':<12}" + f"{'requests':>10}{'failed':>10}{'p95 ms':>10}" * 2 + f"{'ratio':>10}")
    p95s: dict[str, dict[str, int | None]] = {}
    ratios: dict[str, float | None] = {}
    for kind in (*KINDS, ALL):
        line, p95s[kind] = f"{kind:<12}", {}
        for attacked, name in ((False, "without"), (True, "with")):
            of = [each for each in asked[attacked] if kind in (ALL, each.kind)]
            p95s[kind][name] = p95(of)
            line += f"{len(of):>10}{sum(each.failed for each in of):>10}{p95s[kind][name] or '-':>10}"
        without, attacked_p95 = p95s[kind]["without"], p95s[kind]["with"]
        ratios[kind] = round(attacked_p95 / without, 2) if without and attacked_p95 else None
        print(f"{line}{ratios[kind] or '-':>10}")
    everyone = ratios.pop(ALL)
    return {
        "failed_ordinary": sum(each.failed for of in asked.values() for each in of),
        "failed_ordinary_without": sum(each.failed for each in asked[False]),
        "requests": sum(map(len, asked.values())),
        "p95_ms": p95s,
        "p95_ratio": max((ratio for ratio in ratios.values() if ratio), default=None),
        "p95_ratio_all": everyone,
    }


def p95(asked: list[Asked]) -> int | None:
    """Milliseconds of requests that were answered as they should be or not at all: a quick refusal is no answer."""
    times = sorted(each.ended - each.began for each in asked if not each.failed or each.status == "unanswered")
    return round(1000 * times[int(0.95 * len(times))]) if times else None


class Memory:
    """Looks at the server's processes twice a second."""

    def __init__(self, server: Server):
        self.server = server
        self.most = {"gateway": 0, "replica": 0}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def peaks(self) -> dict[str, int]:
        return {f"{name}_peak_mib": round(held / 2**20) for name, held in self.most.items()}

    def _look(self) -> None:
        while not self._over.wait(0.5):
            self._saw("gateway", [self.server.process, *_own(self.server.process)])
            for process in self.server.processes():
                if ordinary.command_line(process).startswith(REPLICA):
                    self._saw("replica", [process, *_children(process, recursive=True)])

    def _saw(self, what: str, processes: Sequence[psutil.Process]) -> None:
        self.most[what] = max(self.most[what], sum(map(_resident, processes)))


def _own(process: psutil.Process) -> list[psutil.Process]:
    """Return the descendants of a process, without Ray and the descendants of Ray."""
    found = []
    for child in _children(process, recursive=False):
        line = ordinary.command_line(child)
        if not (line.startswith("ray::") or "/ray/" in line):
            found += [child, *_own(child)]
    return found


def _children(process: psutil.Process, recursive: bool) -> list[psutil.Process]:
    try:
        return process.children(recursive)
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


if __name__ == "__main__":
    main()
