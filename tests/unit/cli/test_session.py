"""From where a run goes on."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import pytest

from srl_rlvr import checkpoints, cli
from srl_rlvr import config as configs
from srl_rlvr.checkpoints import History, State
from srl_rlvr.cli import session
from srl_rlvr.errors import InputError

RUN = {"name": "run", "data": [{"path": "x.jsonl"}], "stages": [{"kind": "rlvr"}]}


def test_a_run_that_was_begun_before_a_key_came_goes_on(tmp_path: Path) -> None:
    config = configs.parse(RUN, "run")
    before = json.loads(configs.dump(config))
    del before["data"][0]["ordered"], before["model"]["matmul"]
    checkpoints.write(tmp_path, State(version=3), History(), json.dumps(before), lambda folder: None)
    state, _, folder = session._starting_point(config, tmp_path, resume=True)
    assert state.version == 3 and folder == checkpoints.latest(tmp_path)
    other = configs.parse(RUN | {"seed": 1}, "run")
    with pytest.raises(InputError, match="was begun with another 'seed'"):
        session._starting_point(other, tmp_path, resume=True)


def test_a_run_whose_base_is_its_types_goes_on(tmp_path: Path) -> None:
    """Its checkpoints name the base, and its run file does not."""
    run = RUN | {"model_type": "reranker", "name": "goes on", "data": [{"path": str(tmp_path / "missing.jsonl")}]}
    config = configs.parse(run, "run")
    begun = config.model_copy(deep=True)
    begun.model.base = "all-minilm-l6-v2"
    checkpoints.write(tmp_path / "out", State(), History(), configs.dump(begun), lambda folder: None)
    with pytest.raises(InputError, match="missing.jsonl: no such file"):  # which comes after
        session.train(config, tmp_path / "out", resume=True, command="")


def test_what_goes_on_after_ctrl_c_is_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my run.toml").write_text('name = "r"\n[[data]]\npath = "x.jsonl"\n[[stages]]\nkind = "rlvr"\n')
    told: list[str] = []
    monkeypatch.setattr(session, "train", lambda config, out, resume, command: told.append(command) or 0)
    words = ["train", str(tmp_path / "my run.toml"), "--set", "seed=3", "--skip-bad", "--out", str(tmp_path / "o u t")]
    options = cli._parser().parse_args(words)
    assert options.run(options) == 0
    again = cli._parser().parse_args(shlex.split(told[0])[1:])
    assert again == argparse.Namespace(**vars(options) | {"resume": True})
