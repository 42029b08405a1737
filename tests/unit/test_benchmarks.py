"""What benchmarks print and keep, and how the two that attack and kill a server count."""

from __future__ import annotations

import json
import shutil
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import benchmark_module
import pytest


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = benchmark_module.load("_machine")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


def test_a_full_run_leaves_its_line_and_a_quick_one_does_not(shared: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shared.tell("rollout", {"ratio": 1.5}, whole=False)
    assert not shared.RESULTS.exists()
    shared.tell("rollout", {"ratio": 1.5}, whole=True, engine="vllm")
    quick, full = map(json.loads, capsys.readouterr().out.splitlines())
    assert json.loads((shared.RESULTS / "rollout.json").read_text()) == full
    assert full == quick | {"engine": "vllm"}
    assert quick["benchmark"] == "rollout" and quick["figures"] == {"ratio": 1.5} and quick["machine"]["cores"]


def test_random_prompts_are_of_the_models_vocabulary(shared: Any) -> None:
    prompts = shared.random_prompts(shared.SMALL, 3, 50)
    assert [len(prompt) for prompt in prompts] == [50] * 3
    assert max(map(max, prompts)) < 512 and prompts == shared.random_prompts(shared.SMALL, 3, 50)


class Answering(BaseHTTPRequestHandler):
    """Embeddings are answered, routes are refused, streams break off."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # /readyz
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = b"{}"
        self.send_response(500 if self.path == "/v1/route" else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of clients that have left
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_clients_tell_answers_from_failures(address: str) -> None:
    clients = benchmark_module.load("_serving_clients")
    load = clients.Clients(address, ("embeddings", "route", "stream"), 3).start()
    until = time.monotonic() + 30
    while len({each.kind for each in load.asked}) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    asked = load.stop(5.0)
    assert {each.kind: (each.status, each.failed) for each in asked} == {
        "embeddings": ("200", False),
        "route": ("500", True),
        "stream": ("broken stream", True),
    }


class Silent(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        time.sleep(0.8)


def test_a_request_that_is_not_answered_in_time_has_failed() -> None:
    clients = benchmark_module.load("_serving_clients")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        load = clients.Clients(f"http://127.0.0.1:{server.server_address[1]}", ("chat",), 2).start()
        time.sleep(0.2)
        asked = load.stop(0.1)
        server.shutdown()
    assert [(each.status, each.failed) for each in asked] == [("unanswered", True)] * 2


def test_attackers_of_all_kinds_tell_what_they_were_answered(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attackers = benchmark_module.load("_attackers")
    monkeypatch.setattr(attackers, "MIB", 2**10)
    monkeypatch.setattr(attackers, "_FRAMES", 50)
    monkeypatch.setattr(attackers, "_CHOICES", 50)
    port = int(address.rsplit(":", 1)[1])
    patient = attackers.Attack(port, 60)
    for kind, (send, _) in attackers.KINDS.items():
        if kind not in ("open paths", "large JSON"):  # that hold on to the end, and are of 40 MB
            assert set(send(patient)) == {"200"}, kind
    assert "held open" in attackers.open_paths(attackers.Attack(port, 0.5))


def test_a_chain_of_directories_is_an_image_of_one_pixel() -> None:
    import io

    from PIL import Image

    chain = benchmark_module.load("_attackers")._tiff_chain(30)
    image: Any = Image.open(io.BytesIO(chain))
    assert image.size == (1, 1) and image.n_frames == 30


def asked(kind: str, times: list[float], status: str = "200") -> list[Any]:
    """Requests that were answered at once at these times."""
    of = benchmark_module.load("_serving_clients").Asked
    return [of(kind, at - 0.1, at, status, "") for at in times]


def test_an_attack_shows_in_failures_and_in_the_ratio_of_the_endpoint_it_slows() -> None:
    attack = benchmark_module.load("serving_attack")
    of = benchmark_module.load("_serving_clients").Asked
    alone = [of(kind, 0, 0.1, "200", "") for kind in ("chat", "route") for _ in range(20)]
    beside = [of("chat", 0, 0.4, "200", "") for _ in range(20)] + [of("route", 0, 0.1, "200", "") for _ in range(20)]
    beside += [of("route", 0, 0.01, "503", ""), of("parse", 0, 0.1, "422", "")]
    figures = attack.report({False: alone, True: beside}, [{"large JSON": {"413": 2}}])
    assert figures["failed_ordinary"] == 1 and figures["failed_ordinary_without"] == 0
    assert figures["p95_ratio"] == figures["p95_ratio_all"] == 4.0
    assert figures["p95_ms"]["chat"] == {"without": 100, "with": 400}
    assert figures["p95_ms"]["vision"] == {"without": None, "with": None}


def test_the_time_without_answers_after_a_kill_is_the_gap() -> None:
    faults = benchmark_module.load("serving_faults")
    answered = asked("chat", [0.5, 1.0, 9.0, 9.5])
    assert faults.gap(answered, killed=0.2) == 8.0
    assert faults.gap(answered + asked("chat", [20.0], "500"), killed=0.2) == 10.5
    assert faults.gap([], killed=0.2) == 0


def test_a_server_is_ready_from_the_first_answer_without_a_failure_or_a_silence_after_it() -> None:
    faults = benchmark_module.load("serving_faults")
    good = [(float(second), True) for second in range(1, 40)]
    assert faults.good_since(good, killed=0.5, now=40.0) == 1.0
    assert faults.good_since([*good, (5.5, False)], killed=0.5, now=40.0) == 6.0
    assert faults.good_since(good[:3] + good[20:], killed=0.5, now=40.0) == 21.0
    assert faults.good_since(good, killed=0.5, now=60.0) is None
    assert faults.good_since([], killed=0.5, now=1.0) is None


COMMAND = """
import subprocess, sys
part = subprocess.Popen([sys.argv[1], "60"])
stays = subprocess.Popen(["sleep", "60"])
part.wait()
sys.exit(3)
"""


def a_server(program: Path, address: str, folder: Path) -> Any:
    """A command that ends with 3 when the child that runs `program` does, and leaves another one behind."""
    import psutil

    clients = benchmark_module.load("_serving_clients")
    process = psutil.Popen([sys.executable, "-c", COMMAND, str(program)])
    (folder / "log").write_text("")
    while len(process.children()) < 2:
        time.sleep(0.05)
    return clients.Server(address, process, folder / "log")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = benchmark_module.load("serving_faults")
    for name, seconds in {"LOADED_S": 0.1, "CALM_S": 0.3, "LEFT_AFTER_S": 0.1, "MOST_S": 20.0}.items():
        monkeypatch.setattr(module, name, seconds)
    monkeypatch.setattr(module, "KINDS", ("embeddings", "chat"))
    return module


def ended(process: Any) -> bool:
    command_line, until = benchmark_module.load("_serving_clients").command_line, time.monotonic() + 10
    while command_line(process) and time.monotonic() < until:
        time.sleep(0.05)
    return not command_line(process)


def test_a_command_that_ends_is_told_with_its_code_and_what_it_leaves(
    faults: Any, address: str, tmp_path: Path
) -> None:
    shutil.copy(str(shutil.which("sleep")), tmp_path / "gcs_server")
    server = a_server(tmp_path / "gcs_server", address, tmp_path)
    [stays] = [each for each in server.processes() if each.name() == "sleep"]
    found = faults.ending(server, "gcs")
    assert found["exit_code"] == 3 and found["ended_s"] < 10 and found["left"] == 1 and found["failed"] == 0
    assert ended(stays)


def test_a_part_that_is_replaced_is_told_with_its_gap(
    faults: Any, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(str(shutil.which("sleep")), tmp_path / "raylet")
    server = a_server(tmp_path / "raylet", address, tmp_path)
    monkeypatch.setitem(faults.LINES, "replica", "sleep")  # the child that the command does not need
    try:
        found = faults.healed(server, "replica")
    finally:
        mine = server.processes()
        server.process.kill()
        benchmark_module.load("_serving_clients").end(mine)
    assert found["failed"] == 0 and found["asked"] > 0
    assert 0 <= found["ready_s"] < 10 and found["gap_s"] < 10
