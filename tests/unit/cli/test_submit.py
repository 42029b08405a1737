"""What is said of a job that goes on without us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srl_rlvr import cli
from srl_rlvr.cli import submit


class Client:
    def submit_job(self, entrypoint: str, runtime_env: dict[str, Any]) -> str:
        self.runtime_env = runtime_env
        return "job-7"


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
    (tmp_path / "srl_rlvr").mkdir()
    (tmp_path / "run.toml").write_text('[[data]]\nfamily = "sums"\n[[stages]]\nkind = "rlvr"\n')
    monkeypatch.chdir(tmp_path)
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
