"""From where a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from srl_rlvr import checkpoints
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
