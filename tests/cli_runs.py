"""Runs of the real commands in processes of their own, on the tiny model: what integration and fault tests share."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from srl_rlvr.reporting.rollout_log import RolloutLog

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent
DEADLINE_S = 420.0
# Columns that tell how fast a run was, not what it computed.
CLOCKS = re.compile(r"seconds|.*_s|.*_per_s")

# SFT, then SRL, then RLVR with a KL reference; every group of every step is kept for the report.
RUN = """\
name = "tiny"
checkpoint_every = 2
verifiers = ["user_verifiers:dense"]
[model]
base = "{model}"
max_context = 512
[engine]
kind = "transformers"
[[data]]
path = "{data}"
held_out = 6
[[stages]]
kind = "sft"
examples = 8
batch_size = 4
learning_rate = 1e-3
[[stages]]
kind = "srl"
steps = 4
prompts_per_step = 4
group_size = 4
max_tokens = 24
learning_rate = 1e-3
[[stages]]
kind = "rlvr"
steps = 4
prompts_per_step = 3
group_size = 4
max_tokens = 32
learning_rate = 1e-3
kl = 0.05
[verifier]
deadline_s = 2.0
[evaluation]
max_tokens = 24
[tracking]
mlflow = false
rollouts_per_step = 1000
"""
UPDATES = {"sft": 2, "srl": 4, "rlvr": 4}


def write_problems(file: Path, verifier: str = "user_verifiers:dense", count: int = 30) -> Path:
    """Generated sums as a user's file in the schema of gsm8k, each with the user's own verifier."""
    from srl_rlvr.examples import generated

    with file.open("w") as stream:
        for example in generated.generate("sums", count, seed=1).to_pylist():
            row = {"question": example["prompt"], "answer": example["reference"], "steps": example["steps"]}
            stream.write(json.dumps(row | {"verifier": verifier}) + "\n")
    return file


def write_run(folder: Path, model: Path, text: str = RUN, verifier: str = "user_verifiers:dense") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = write_problems(folder / "problems.jsonl", verifier)
    file = folder / "run.toml"
    text = text.replace('"user_verifiers:dense"', f'"{verifier}"')
    file.write_text(text.format(model=model, data=data))
    return file


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without what would lead a run elsewhere, and with the project and the tests to import from."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "PYTEST_"))}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(TESTS)])
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found.get("PATH", "")])
    return {**found, **(extra or {})}


class Command:
    """`srl-rlvr ARGUMENTS` as a process group of its own, as a terminal would start it."""

    def __init__(self, arguments: Sequence[object], cwd: Path, env: Mapping[str, str] | None = None):
        self.started = time.monotonic()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with this object)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "srl_rlvr", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=cwd,
            env=environment(env),
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.family: dict[int, psutil.Process] = {}  # every process seen below this one, alive or not
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def until(self, pattern: str, deadline_s: float = DEADLINE_S) -> str:
        """The first line of output that matches `pattern`; fails where the command ends or is late without it."""
        end = time.monotonic() + deadline_s
        while True:
            with self._news:
                found = next((line for line in self.lines if re.search(pattern, line)), None)
                self._news.wait(0.1)
            if found is not None:
                return found
            self._look_around()
            if self.process.poll() is not None and not self._reader.is_alive():
                raise AssertionError(f"ended with {self.process.returncode} before '{pattern}': {self.tail()}")
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"no '{pattern}' within {deadline_s:.0f} s: {self.tail()}")

    def interrupt(self) -> None:
        """Ctrl-C: every process of the group gets it, as from a terminal."""
        self._look_around()
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self, deadline_s: float = DEADLINE_S) -> Finished:
        end = time.monotonic() + deadline_s
        while self.process.poll() is None:
            self._look_around()
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"still running after {deadline_s:.0f} s: {self.tail()}")
            time.sleep(0.2)
        self._reader.join(10)
        self._errors.seek(0)
        errors = self._errors.read()
        self._errors.close()
        return Finished(
            self.process.returncode,
            "".join(self.lines),
            errors,
            time.monotonic() - self.started,
            [*self.family.values()],
        )

    def actors(self, name: str) -> list[psutil.Process]:
        """Ray's worker processes of that class, below this command."""
        self._look_around()
        title = re.compile(rf"ray::(.*:)?{name}\b")  # in a call, an actor's own name comes before its class
        return [process for process in self.family.values() if title.match(_title(process))]

    def actor(self, name: str, deadline_s: float = 60.0) -> psutil.Process:
        end = time.monotonic() + deadline_s
        while not (found := self.actors(name)):
            assert time.monotonic() < end, f"no process ray::{name}"
            time.sleep(0.2)
        return found[0]

    def kill(self) -> None:
        self._look_around()
        for process in [self.process, *self.family.values()]:
            if isinstance(process, subprocess.Popen) or process.is_running():
                process.kill()

    def tail(self) -> str:
        self._errors.flush()
        with open(f"/proc/self/fd/{self._errors.fileno()}") as errors:
            return f"\n{''.join(self.lines[-8:])}\n{errors.read()[-1500:]}"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()

    def _look_around(self) -> None:
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for process in below:
            self.family.setdefault(process.pid, process)


@dataclass
class Finished:
    code: int
    out: str
    err: str
    seconds: float
    family: list[psutil.Process]

    def survivors(self, grace_s: float = 20.0) -> list[str]:
        """Processes of the run that are still there a while after its end."""
        _, alive = psutil.wait_procs(self.family, timeout=grace_s)
        return [_title(process) for process in alive if process.is_running() and _title(process)]


def srl_rlvr(
    *arguments: object, cwd: Path, env: Mapping[str, str] | None = None, deadline_s: float = DEADLINE_S
) -> Finished:
    """Run a command to its end."""
    return Command(arguments, cwd, env).finish(deadline_s)


def _title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0] if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.NoSuchProcess:
        return ""


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def computed(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of metrics.parquet without the columns that depend on the clock."""
    return table.select([name for name in table.column_names if not CLOCKS.fullmatch(name)]).to_pylist()


def metrics(out: Path) -> list[dict[str, Any]]:
    return computed(pq.read_table(out / "metrics.parquet"))


def rollouts(out: Path) -> list[dict[str, Any]]:
    """Every rollout that the run keeps: stage, step, prompt, tokens, rewards, advantages."""
    return RolloutLog(out / "rollouts").read().to_pylist()


def same_results(out: Path, reference: Path) -> None:
    """Assert that two runs computed the same: metrics, every prompt and token, and the model byte for byte."""
    assert metrics(out) == metrics(reference)
    assert rollouts(out) == rollouts(reference)
    assert weights(out) == weights(reference)


def wait_for(condition: Callable[[], Any], what: str, deadline_s: float = 60.0) -> Any:
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {deadline_s:.0f} s for {what}"
        time.sleep(0.3)
    return found
