"""How a command ends, tried on a small one in a process of its own: no Ray."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve import lifecycle

COMMAND = """
import asyncio, subprocess, sys, time
from serve.lifecycle import Lifecycle
phase, ray = sys.argv[1:]
with Lifecycle() as life:
    # One that ends when it is asked, one that does not, and one whose parent is gone.
    subprocess.Popen(["sleep", "60"])
    subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, lambda *_: None); time.sleep(60)"])
    subprocess.run(["sh", "-c", "sleep 61 & exit 0"])
    if ray:
        subprocess.Popen([ray, "62"])
        life.watch_ray("/the/logs")
    if phase == "starting":
        print("ready", flush=True)
        time.sleep(30)
    async def loop():
        print("ready", flush=True)
        while not over:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0 if phase == "idle" else 30)
    def run():
        try:
            import uvloop as loops  # it heeds signals by itself
        except ImportError:
            loops = asyncio
        loops.run(loop())
    over = []
    life.serve(run, lambda: over.append(1))
    print("served", flush=True)
"""


class Command:
    def __init__(self, phase: str, ray: str = ""):
        self.process = subprocess.Popen([sys.executable, "-c", COMMAND, phase, ray], stdout=-1, stderr=-1, text=True)
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"
        while len(children := psutil.Process(self.process.pid).children(recursive=True)) < 3 + bool(ray):
            time.sleep(0.01)
        self.children = children
        time.sleep(0.3)  # until one of them heeds no signal

    def ended(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err

    def left(self) -> list[psutil.Process]:
        return [child for child in self.children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def started() -> Iterator[Any]:
    commands: list[Command] = []

    def start(*arguments: str) -> Command:
        commands.append(Command(*arguments))
        return commands[-1]

    yield start
    for command in commands:
        for process in (*command.children, psutil.Process()):
            if process.pid != psutil.Process().pid and process.is_running():
                process.kill()
        command.process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_starts_ends_it_at_once_and_leaves_nothing(started: Any, number: int) -> None:
    command = started("starting")
    command.process.send_signal(number)
    code, out, err = command.ended()
    assert code == 128 + number and out.startswith("stopping") and err == "" and command.left() == []


def test_the_first_signal_lets_it_finish_and_it_leaves_nothing(started: Any) -> None:
    command = started("idle")
    command.process.send_signal(signal.SIGINT)
    code, out, err = command.ended()
    assert code == 0 and out.startswith("stopping") and out.endswith("served\n") and err == ""
    assert command.left() == []


def test_the_second_signal_ends_it_at_once_and_leaves_nothing(started: Any) -> None:
    command = started("slow")
    command.process.send_signal(signal.SIGINT)
    assert command.process.stdout.readline().startswith("stopping")
    command.process.send_signal(signal.SIGINT)
    code, out, err = command.ended()
    assert code == 130 and out == "ended at once\n" and err == "" and command.left() == []


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
@pytest.mark.parametrize("phase", ["starting", "slow"])
def test_when_ray_ends_it_ends_with_one_line_and_leaves_nothing(
    started: Any, name: str, phase: str, tmp_path: Path
) -> None:
    sleep = shutil.which("sleep")
    assert sleep
    shutil.copy(sleep, tmp_path / name)
    command = started(phase, str(tmp_path / name))
    next(child for child in command.children if child.name() == name).kill()
    code, _, err = command.ended()
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert name in err and "/the/logs" in err and command.left() == []


def test_what_rays_thread_of_errors_prints_is_left_out() -> None:
    said = io.StringIO()
    stream = lifecycle.WithoutRaysErrors(said)
    for name in ("ray_listen_error_messages", "another"):
        thread = threading.Thread(target=print, args=(name,), kwargs={"file": stream}, name=name)
        thread.start()
        thread.join()
    assert said.getvalue() == "another\n"
