"""What is said of a job that goes on without us."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from srl_rlvr import cli
from srl_rlvr.cli import submit
from srl_rlvr.errors import InputError


class Client:
    def submit_job(self, entrypoint: str, runtime_env: dict[str, Any]) -> str:
        self.runtime_env = runtime_env
        return "job-7"


def project(folder: Path, monkeypatch: pytest.MonkeyPatch, data: str = 'family = "sums"') -> None:
    (folder / "srl_rlvr").mkdir()
    (folder / "run.toml").write_text(f'[[data]]\n{data}\n[[stages]]\nkind = "rlvr"\n')
    monkeypatch.chdir(folder)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], client: Any = None) -> str:
    monkeypatch.setattr(submit, "_client", lambda address: client or pytest.fail("the cluster was asked"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", "http://head:8265", "run.toml"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and len(told.splitlines()) == 1
    return told


def accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_client", lambda address: Client())
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", "http://head:8265", "run.toml", "--no-wait"])
    assert ended.value.code == 0


def test_a_folder_that_is_too_large_is_refused_before_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project(tmp_path, monkeypatch)
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(200 * 2**20)
    told = refused(monkeypatch, capsys)
    assert "weights.bin (200.0 MiB)" in told and "100 MiB" in told and ".rayignore" in told
    (tmp_path / ".gitignore").write_text("*.bin\n")
    accepted(monkeypatch)


def test_a_cluster_that_takes_less_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Small(Client):
        def submit_job(self, entrypoint: str, runtime_env: dict[str, Any]) -> str:
            raise RuntimeError("Request failed with status code 413: Maximum request body size 1 exceeded..")

    project(tmp_path, monkeypatch)
    assert "http://head:8265" in refused(monkeypatch, capsys, Small())


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ('path = "data/rows.jsonl"', ".gitignore"),
        ('path = "../rows.jsonl"', "outside"),
        ('path = "out"', "leaves it out"),
    ],
)
def test_data_that_would_not_be_sent_is_named(
    data: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "project"
    for place in (folder / "data", tmp_path, folder / "out"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "rows.jsonl").write_text("{}\n")
    project(folder, monkeypatch, data)
    (folder / ".gitignore").write_text("data/\n")
    told = refused(monkeypatch, capsys)
    assert "data[0].path" in told and word in told


def test_linked_data_is_sent_and_a_link_to_its_own_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "rows.jsonl").write_text("{}\n")
    (folder / "linked").symlink_to(elsewhere)
    project(folder, monkeypatch, 'path = "linked/rows.jsonl"')
    accepted(monkeypatch)
    (folder / "self").symlink_to(folder)
    assert str(folder / "self") in refused(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("lost", "code", "said"),
    [(KeyboardInterrupt(), 130, "job job-7 goes on"), (ConnectionError("gone"), 1, "is lost: gone; job job-7 goes on")],
)
def test_a_job_that_is_no_longer_followed_is_said_to_go_on(
    lost: BaseException,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    project(tmp_path, monkeypatch)
    client = Client()
    monkeypatch.setattr(submit, "_client", lambda address: client)

    def follow(client: Any, job: str) -> int:
        raise lost

    monkeypatch.setattr(submit, "_follow", follow)
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", "http://head:8265", "run.toml"])
    told = capsys.readouterr().err
    assert ended.value.code == code and said in told and "ray job stop --address http://head:8265 job-7" in told
    assert int(client.runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 600


def test_a_port_that_does_not_speak_http_is_no_dashboard() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            connection.sendall(b"\x00\x00\x12\x04 not HTTP\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(InputError, match="is no dashboard"):
            submit._client(f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_a_head_whose_agent_is_still_starting_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Starting(Client):
        tries = 0

        def submit_job(self, entrypoint: str, runtime_env: dict[str, Any]) -> str:
            self.tries += 1
            if self.tries < 3:
                raise RuntimeError("Request failed with status code 500: No available agent to submit job")
            return super().submit_job(entrypoint, runtime_env)

    monkeypatch.setattr(submit, "_POLL_S", 0.0)
    assert submit._submitted(Starting(), "python", {}) == "job-7"
