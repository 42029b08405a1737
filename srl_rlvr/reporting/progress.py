"""Live progress: a panel that redraws in a terminal, one plain line a step anywhere else.

It is told what happens and prints it; it must not know where the numbers come from. Nothing else in a run prints.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_PLAIN_PHASE_EVERY_S = 30.0  # a log file should show that an evaluation of ten minutes is alive, and no more
_RECENT_STEPS = 20  # the estimate follows what the run does now, not its slow start


class Progress:
    """Use as a context manager: `stage` opens a stage, `step` reports one update, `phase` what happens in between.

    plan: (label, steps) of every stage of the run, in order; with it the time left is that of the whole run.
    """

    def __init__(
        self,
        plan: Sequence[tuple[str, int]] = (),
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._plan = list(plan)
        self._console = Console(file=stream or sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._clock = clock
        self._live: Live | None = None
        self._label, self._kind, self._steps = "", "", 0
        self._width = max((len(label) for label, _ in plan), default=0)
        self._durations_s: list[float] = []
        self._last_s = clock()
        self._step_line = ""
        self._done = 0
        self._phase_kind, self._phase_shown_s = "", float("-inf")
        self._spinner = Spinner("dots")

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True, get_renderable=self._panel)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._keep_last_step()
        if self._live:
            self._live.stop()
            self._live = None

    def stage(self, label: str, kind: str, steps: int) -> None:
        """Open the stage `label` of `steps` updates."""
        self._keep_last_step()
        self._label, self._kind, self._steps, self._done = label, kind, steps, 0
        self._width = max(self._width, len(label))
        self._durations_s, self._step_line = [], ""
        self._last_s = self._clock()
        self._end_phase()

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Report update `step`, counted from 0 within the stage."""
        now_s = self._clock()
        self._durations_s = [*self._durations_s[1 - _RECENT_STEPS :], now_s - self._last_s]
        self._last_s = now_s
        self._done = step + 1
        self._step_line = "  ".join(self._step_parts(metrics))
        self._end_phase()
        if not self._live:
            self._print(self._step_line)

    def phase(self, text: str) -> None:
        """Say what happens between updates: "starting engine", "evaluating base 30/100"."""
        kind = re.sub(r"\d+", "", text)
        due = self._clock() - self._phase_shown_s >= _PLAIN_PHASE_EVERY_S
        if not self._live and (kind != self._phase_kind or due):
            self._print(text)
            self._phase_shown_s = self._clock()
        if kind != self._phase_kind:
            # Time between updates that is not an update (an evaluation, a restart) is no part of a step.
            self._last_s = self._clock()
        self._phase_kind = kind
        self._spinner.update(text=Text(text))

    def note(self, text: str) -> None:
        """Print `text` so that it stays."""
        self._print(text)

    def _end_phase(self) -> None:
        self._phase_kind, self._phase_shown_s = "", float("-inf")

    def _keep_last_step(self) -> None:
        if self._live and self._step_line:
            self._print(self._step_line)

    def _print(self, text: str) -> None:
        self._console.print(Text(text))

    def _step_parts(self, metrics: Mapping[str, float | None]) -> list[str]:
        counter = f"{self._done}/{self._steps}"
        parts = [f"{self._label:<{self._width}}   {counter:>{2 * len(str(self._steps)) + 1}}"]
        learned = ("reward", "pass_rate") if metrics.get("reward") is not None else ("loss",)
        for column in learned:
            value = metrics.get(column)
            if value is not None:
                parts.append(f"{'pass' if column == 'pass_rate' else column} {value:.2f}")
        tokens_per_s = metrics.get("tokens_per_s")
        if tokens_per_s is not None:
            parts.append(f"{tokens_per_s:.0f} tok/s")
        parts.append(f"{self._durations_s[-1]:.1f} s/step")
        parts.append(f"left {duration(self._left_s())}")
        return parts

    def _left_s(self) -> float:
        labels = [label for label, _ in self._plan]
        after = self._plan[labels.index(self._label) + 1 :] if self._label in labels else []
        steps = self._steps - self._done + sum(steps for _, steps in after)
        return steps * statistics.median(self._durations_s)

    def _panel(self) -> Group:
        parts: list[Table | Text | Spinner] = []
        if self._label:
            bar = Table.grid(padding=(0, 1))
            stage = Text(self._label if self._label == self._kind else f"{self._label} ({self._kind})", style="bold")
            bar.add_row(stage, ProgressBar(total=max(self._steps, 1), completed=self._done, width=32))
            parts += [bar, Text(self._step_line)]
        if self._phase_kind:
            parts.append(self._spinner)
        return Group(*parts)


def duration(seconds: float) -> str:
    """`seconds` as a person would say it: "40 s", "2 min", "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
