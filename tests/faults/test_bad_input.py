"""Every kind of bad input: one line that names it and says what to do, exit code 2, within seconds."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import Finished, srl_rlvr, write_run

from srl_rlvr import config as configs
from srl_rlvr import folder_lock

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]
# A command that only looks takes 2 to 15 s to start on busy cores; without care Ray takes a minute over a dead address.
SECONDS = 40.0


@pytest.fixture
def run_file(tiny_model: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path, tiny_model)


def refused(finished: Finished, *parts: str) -> None:
    assert finished.code == 2, finished.out + finished.err
    lines = finished.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), finished.err
    for part in parts:
        assert part in lines[0], finished.err
    assert "Traceback" not in finished.out
    assert finished.seconds < SECONDS


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stages.srl.stepz=3", ["stepz", "unknown key", "did you mean 'steps'?"]),
        ("modle.base=x", ["modle", "did you mean 'model'?"]),
        ("stages.srl.steps=many", ["steps", "many"]),
        ("stages.rlvr.group_size=1", ["group_size", "2"]),
        ("stages.srl.clip_low=1.5", ["clip_low"]),
        ("max_staleness=-1", ["max_staleness", "0"]),
        ("model.max_context=64", ["tokens long", "model.max_context is 64"]),
        ("model.max_context=4096", ["model.max_context is 4096", "1024"]),
        ("model.base=/nowhere/model", ["/nowhere/model", "no such folder"]),
        ("cluster.address=127.0.0.1:1", ["cannot reach the Ray cluster at '127.0.0.1:1'", "refused"]),
        ("cluster.address=ray://127.0.0.1:1", ["cannot reach the Ray cluster", "refused"]),
        ("cluster.address=http://127.0.0.1:8265", ["no address of a Ray cluster"]),
        ("cluster.gpus_per_generator=1", ["does not fit", "1 GPU", "0 GPU"]),
    ],
)
def test_a_wrong_setting(run_file: Path, tmp_path: Path, override: str, parts: list[str]) -> None:
    refused(srl_rlvr("train", run_file, "--set", override, "--out", "out", cwd=tmp_path), *parts)


def test_a_cluster_address_where_something_else_listens(run_file: Path, tmp_path: Path, mute_port: int) -> None:
    override = f"cluster.address=127.0.0.1:{mute_port}"
    finished = srl_rlvr("train", run_file, "--set", override, "--out", "out", cwd=tmp_path)
    refused(finished, f"cannot reach the Ray cluster at '127.0.0.1:{mute_port}'")


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept_for_ever, args=(server,), daemon=True).start()
    yield server.getsockname()[1]
    server.close()


def _accept_for_ever(server: socket.socket) -> None:
    held = []
    while True:
        try:
            held.append(server.accept()[0])
        except OSError:
            return


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([], ["holds no rows"]),
        ([{"question": "1 + 1?", "anwser": "2"}], ["row 1", "column 'answer' is missing", "anwser"]),
        ([{"question": "1 + 1?", "answer": [2]}], ["row 1", "column 'answer'", "a list"]),
        (
            [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(9)],
            ["no expert steps", "'steps' or 'solution'"],
        ),
        ([{"question": "1 + 1?", "answer": "2", "steps": ["1 + 1 = 2"]}], ["data.held_out is 6", "lower it"]),
    ],
    ids=["empty", "missing column", "wrong column", "no steps for SRL", "fewer than held out"],
)
def test_wrong_data(run_file: Path, tmp_path: Path, rows: list[dict], parts: list[str]) -> None:
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(srl_rlvr("train", run_file, "--out", "out", cwd=tmp_path), "problem", *parts)


def test_a_verifier_that_cannot_be_imported(tiny_model: Path, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, tiny_model, verifier="no_such_module:score")
    refused(srl_rlvr("train", run_file, "--out", "out", cwd=tmp_path), "'no_such_module:score'", "PYTHONPATH")


@pytest.mark.parametrize("missing", ["tokenizer", "config.json", "weights"])
def test_a_model_folder_that_is_not_whole(run_file: Path, tiny_model: Path, tmp_path: Path, missing: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    patterns = {"tokenizer": "tokenizer*", "config.json": "config.json", "weights": "*.safetensors"}
    for file in model.glob(patterns[missing]):
        file.unlink()
    refused(
        srl_rlvr("train", run_file, "--set", f"model.base={model}", "--out", "out", cwd=tmp_path), str(model), missing
    )


@pytest.mark.parametrize(
    ("change", "said"), [({"num_hidden_layers": 9}, "its weights lack"), ({"hidden_act": "none"}, "KeyError: 'none'")]
)
def test_a_model_folder_whose_config_does_not_fit(
    run_file: Path, tiny_model: Path, tmp_path: Path, change: dict, said: str
) -> None:
    config = shutil.copytree(tiny_model, tmp_path / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    finished = srl_rlvr("train", run_file, "--set", f"model.base={config.parent}", "--out", "out", cwd=tmp_path)
    refused(finished, str(config.parent), said)


def test_a_folder_that_holds_a_run(run_file: Path, tmp_path: Path) -> None:
    _begun(tmp_path / "out", run_file)
    finished = srl_rlvr("train", run_file, "--out", "out", cwd=tmp_path)
    refused(finished, "out holds a run already", "update-000002-stage-1", "--resume", "--out")


def test_a_folder_that_another_run_writes(run_file: Path, tmp_path: Path) -> None:
    with folder_lock.locked(tmp_path / "out"):
        for more in ([], ["--resume"]):
            finished = srl_rlvr("train", run_file, "--out", "out", *more, cwd=tmp_path)
            refused(finished, f"out is in use by process {os.getpid()} on ", "--out")


def test_resume_with_another_config(run_file: Path, tmp_path: Path) -> None:
    _begun(tmp_path / "out", run_file)
    finished = srl_rlvr("train", run_file, "--out", "out", "--resume", "--set", "seed=5", cwd=tmp_path)
    refused(finished, "another 'seed'", "--out")


def test_resume_from_a_damaged_checkpoint(run_file: Path, tmp_path: Path) -> None:
    _begun(tmp_path / "out", run_file)
    finished = srl_rlvr("train", run_file, "--out", "out", "--resume", cwd=tmp_path)
    refused(finished, "update-000002-stage-1", "cannot be read", "delete it")


def test_a_folder_that_cannot_be_written(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(srl_rlvr("train", run_file, "--out", "file/out", cwd=tmp_path), "file/out", "--out")


def test_a_run_file_that_is_missing_or_no_toml(tmp_path: Path) -> None:
    refused(srl_rlvr("train", "nowhere.toml", cwd=tmp_path), "nowhere.toml", "no such run file")
    (tmp_path / "broken.toml").write_text("name = \n")
    refused(srl_rlvr("train", "broken.toml", cwd=tmp_path), "broken.toml", "not valid TOML")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:8265"])
def test_submit_to_no_dashboard(run_file: Path, tmp_path: Path, address: str) -> None:
    (tmp_path / "srl_rlvr").mkdir()
    refused(srl_rlvr("submit", address, run_file, "--working-dir", tmp_path, cwd=tmp_path), address)


def test_submit_to_a_dashboard_that_never_answers(run_file: Path, tmp_path: Path, mute_port: int) -> None:
    (tmp_path / "srl_rlvr").mkdir()
    address = f"http://127.0.0.1:{mute_port}"
    refused(srl_rlvr("submit", address, run_file, "--working-dir", tmp_path, cwd=tmp_path), address)


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_a_file_or_model_that_is_not_there(tiny_model: Path, run_file: Path, tmp_path: Path, command: str) -> None:
    finished = srl_rlvr(command, tiny_model, "--data", "problem.jsonl", cwd=tmp_path)
    refused(finished, "problem.jsonl", "no such file", "problems.jsonl")
    refused(srl_rlvr(command, "./nowhere", "--data", "problems.jsonl", cwd=tmp_path), "./nowhere", "no such folder")


def test_answers_that_have_no_place(tiny_model: Path, run_file: Path, tmp_path: Path) -> None:
    finished = srl_rlvr("predict", tiny_model, "--data", "problems.jsonl", "--out", "gone/a.jsonl", cwd=tmp_path)
    refused(finished, "gone/a.jsonl", "there is no folder gone")


def test_doctor_names_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    finished = srl_rlvr("doctor", "--address", "127.0.0.1:1", cwd=tmp_path)
    assert finished.code == 1
    assert "refused" in next(line for line in finished.out.splitlines() if "cluster" in line)
    assert finished.seconds < SECONDS


def _begun(out: Path, run_file: Path) -> None:
    """A folder with a checkpoint of `run_file`, whose state nobody can read."""
    checkpoint = out / "checkpoints" / "update-000002-stage-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(configs.dump(configs.load(run_file)))
    (checkpoint / "state.json").write_text("{")
