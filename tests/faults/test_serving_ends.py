"""`srl-rlvr serve` when Ray dies under it, and when it is told to end: one line, an exit code, and nothing left."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
NAME = "Übersetzer / 1"


class Serving:
    def __init__(self, folder: Path, models: list[Path]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "srl_rlvr", "serve", "--port", str(self.port)]
        for model in models:
            command += ["--model", str(model)]
        self.out, self.err = folder / "out.log", folder / "err.log"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)
        self.children: list[psutil.Process] = []

    def until(self, text: str, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.out.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.1)
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def listening(self) -> set[str]:
        """Addresses that the command's processes listen at, but for Ray Serve's own of each replica."""
        processes = [psutil.Process(self.process.pid), *self.children]
        return {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in processes
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
            and not (process.name().startswith("ray::ServeRepl") and connection.laddr.ip == "::")
        }

    def ended(self, seconds: float) -> tuple[int, str]:
        code = self.process.wait(seconds)
        left = [child for child in self.children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert left == []
        return code, self.err.read_text()


@pytest.fixture
def serving(folders: dict[str, Path], tmp_path: Path) -> Iterator[Serving]:
    named = shutil.copytree(folders["intent_router"], tmp_path / "named")
    card = json.loads((named / "model_card.json").read_text())
    (named / "model_card.json").write_text(json.dumps(card | {"name": NAME}))
    found = Serving(tmp_path, [named])
    yield found
    found.process.kill()
    for child in found.children:
        if child.is_running():
            child.kill()


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_when_ray_ends_the_command_says_so_and_leaves_nothing(serving: Serving, name: str) -> None:
    serving.until("OpenAPI")
    body = json.dumps({"model": NAME, "input": "where is my card"}).encode()
    asked: Any = Request(f"http://127.0.0.1:{serving.port}/v1/route", body, {"content-type": "application/json"})
    with urlopen(asked, timeout=60) as answer:
        assert json.load(answer)["model"] == NAME
    assert serving.listening() == {"127.0.0.1"}
    next(child for child in serving.children if child.name() == name).kill()
    code, err = serving.ended(15)
    assert code == 1 and name in err and err.count("\n") == 1


def test_ctrl_c_while_a_model_starts_ends_it_at_once(serving: Serving) -> None:
    serving.until(f"starting {NAME}")
    serving.process.send_signal(signal.SIGINT)
    code, err = serving.ended(10)
    assert code == 130 and err == "" and "stopping" in serving.out.read_text()


def test_an_ordinary_end_prints_no_error(serving: Serving) -> None:
    serving.until("OpenAPI")
    serving.process.send_signal(signal.SIGINT)
    code, err = serving.ended(60)
    assert code == 0 and err == ""
