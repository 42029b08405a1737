"""`srl-rlvr submit` to a real head with token authentication: the upload runs, and its metrics can be scraped."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from cli_runs import ROOT, TESTS, Command, environment, wait_for, write_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@dataclass
class Head:
    dashboard: str
    gcs: str
    folder: Path
    env: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray head of our own: own ports, own folder (short: Unix sockets live in it), token authentication."""
    folder = Path(tempfile.mkdtemp(prefix="srl-"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    gcs, dashboard, client, listen, grpc, metrics = _free_ports(6)
    env = environment(auth | {"RAY_metrics_report_interval_ms": "1000"})
    del env["PYTHONPATH"]  # a cluster has the dependencies and nothing of ours
    log = (folder / "head.log").open("w")
    process = subprocess.Popen(
        ["ray", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2",
         "--dashboard-host=127.0.0.1", f"--temp-dir={folder}", f"--ray-client-server-port={client}",
         f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}",
         f"--metrics-export-port={metrics}", "--disable-usage-stats"],
        env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder,
    )  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or _answers(dashboard), "the head's dashboard", 120)
        assert process.poll() is None, (folder / "head.log").read_text()
        yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", folder, auth)
    finally:
        _end(process.pid)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def project(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project as a working folder, told apart by its version; the user's verifier lies in it."""
    folder = tmp_path_factory.mktemp("project")
    for package in ("srl_rlvr", "actors"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TESTS / "user_verifiers.py", folder)
    init = folder / "srl_rlvr" / "__init__.py"
    init.write_text(init.read_text() + '\n__version__ = "0.0.uploaded"\n')
    run_file = write_run(folder, tiny_model)
    run_file.write_text(run_file.read_text().replace(str(folder / "problems.jsonl"), "problems.jsonl"))
    return folder


def test_a_submitted_run_uses_the_upload_and_shows_its_metrics(head: Head, project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = ["--set", "stages.srl.steps=8", "--set", "stages.rlvr.steps=2"]
    env = head.env | {"PYTHONPATH": str(project)}
    job = Command(["submit", head.dashboard, "run.toml", "--out", out, *steps], project, env)
    job.until(r"srl +[1-9]/8", 300)
    gauges = ("reward", "pass_rate", "divergence", "tokens_per_s", "staleness", "groups_drawn", "update_seconds_bucket")
    wanted = ["ray_srl_rlvr_outcomes", *(f"ray_srl_rlvr_{name}{{" for name in gauges)]
    missing = list(wanted)

    def all_seen() -> bool:
        text = _scrape(head.folder)
        missing[:] = [name for name in missing if name not in text]
        return not missing

    wait_for(lambda: all_seen() or job.process.poll() is not None, "the run's metrics", 120)
    finished = job.finish()
    assert finished.code == 0, finished.out[-3000:] + finished.err
    assert not missing
    assert "rlvr   2/2" in finished.out and "pass rate" in finished.out
    card = json.loads((out / "model" / "model_card.json").read_text())
    assert card["srl_rlvr"] == "0.0.uploaded"
    assert json.loads((out / "result.json").read_text())["held_out"]["n"] == 6


def test_a_job_that_fails_tells_why_here(head: Head, project: Path, tmp_path: Path) -> None:
    env = head.env | {"PYTHONPATH": str(project)}
    arguments = ["submit", head.dashboard, "run.toml", "--out", tmp_path / "out", "--set", "cluster.gpus_per_learner=1"]
    finished = Command(arguments, project, env).finish()
    assert finished.code == 1
    assert "the run does not fit" in finished.out
    assert finished.err.startswith("error: job raysubmit_") and len(finished.err.splitlines()) == 1


def test_without_the_token_one_line_says_so(head: Head, project: Path) -> None:
    finished = Command(["submit", head.dashboard, "run.toml"], project, {"RAY_AUTH_MODE": "disabled"}).finish(60)
    assert finished.code == 2
    assert len(finished.err.splitlines()) == 1 and "RAY_AUTH_TOKEN_PATH" in finished.err


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _scrape(folder: Path) -> str:
    """What Prometheus would read: every target of Ray's own service discovery file."""
    file = folder / "prom_metrics_service_discovery.json"
    text = ""
    for group in json.loads(file.read_text()) if file.exists() else []:
        for target in group["targets"]:
            try:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                    text += answer.read().decode()
            except (urllib.error.URLError, OSError):
                continue
    return text


def _end(pid: int) -> None:
    """End the head and all below it, and nothing else."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        if process.is_running():
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=15)
    for process in alive:
        process.kill()
