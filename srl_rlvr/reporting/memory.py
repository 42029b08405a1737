"""Peak memory of this process and everything below it, as proportional set size: shared pages count once."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil

# Summing up costs the kernel about a tenth of a second for some GiB of mapped pages.
_EVERY_S = 5.0


class PeakMemory:
    """Use as a context manager; `gib` is the highest sum seen, `parts_gib` what it was made of, by process name."""

    def __init__(self, so_far_gib: float = 0.0):
        self.gib = so_far_gib
        self.parts_gib: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY_S):
            parts: dict[str, float] = {}
            me = psutil.Process()
            for process in [me, *me.children(recursive=True)]:
                try:
                    name = process.name()
                    parts[name] = parts.get(name, 0.0) + _pss_gib(process.pid)
                except (psutil.NoSuchProcess, OSError):
                    continue  # it ended while we looked
            total = sum(parts.values())
            if total > self.gib:
                self.gib, self.parts_gib = total, parts


def _pss_gib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 2**20
    return 0.0
