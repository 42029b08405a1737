"""Champions of a tracking server that keeps the files itself, as teams have it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from srl_rlvr.registry import champions

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--serve-artifacts",
        "--artifacts-destination", str(tmp_path / "store"),
    ]  # fmt: skip
    address, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it has workers, and no state that outlives this test
        process.wait(30)


def test_a_version_of_a_tracking_server_is_downloaded_once(server: str, tmp_path: Path) -> None:
    client = mlflow.MlflowClient(server)
    run = client.create_run(client.create_experiment("e")).info
    client.create_registered_model("routing")

    def train(text: str) -> None:
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(text)
        client.log_artifacts(run.run_id, str(tmp_path / "model"), "model")
        version = client.create_model_version("routing", f"runs:/{run.run_id}/model", run.run_id)
        client.set_registered_model_alias("routing", "champion", version.version)

    def fetched() -> tuple[Any, Path]:
        champion = champions.find(tmp_path)["routing"]
        return champion, champions.fetch(champion, tmp_path / "cache")

    assert run.artifact_uri.startswith("mlflow-artifacts:")
    train("1")
    found = {fetched() for _ in range(3)}
    assert len(found) == 1
    [(first, folder)] = found
    assert (folder / "config.json").read_text() == "1"
    began = folder.stat().st_mtime_ns
    train("2")  # over the same files of the same run
    second, other = fetched()
    assert second != first and (other / "config.json").read_text() == "2"
    assert (folder / "config.json").read_text() == "1" and folder.stat().st_mtime_ns == began
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2
