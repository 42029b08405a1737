"""A search from its command: trials are runs, the worse is stopped, the best becomes a run file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_model
from cli_runs import Command, srl_rlvr

from srl_rlvr import config as configs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

RUN = """\
name = "tiny"
[model]
base = "./model"
max_context = 512
[engine]
kind = "transformers"
[[data]]
family = "sums"
train = 8
dev = 2
held_out = 2
[[stages]]
kind = "sft"
epochs = 30
[evaluation]
max_tokens = 8
every = 10
[tracking]
mlflow = true
"""
SPACE = """\
trials = 2
grace = 20
reduction = 2
[keys]
"stages.sft.learning_rate" = { log_uniform = [1e-5, 1e-3] }
"stages.sft.batch_size" = { choice = [4] }
"""

UPDATES = 60  # 30 epochs of 8 problems, 4 in an update


def test_a_search_is_stopped_and_resumed_and_its_best_is_a_run_file(tmp_path: Path) -> None:
    tiny_model.write(tmp_path / "model")
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "space.toml").write_text(SPACE)
    words = ("tune", "run.toml", "space.toml", "--out", "out")
    search = Command(words, cwd=tmp_path)
    search.until("of dev after")
    search.interrupt()
    stopped = search.finish()
    assert stopped.code == 130 and "--resume" in stopped.err, stopped.err
    assert not (tmp_path / "out" / "best.toml").exists()

    again = srl_rlvr(*words, cwd=tmp_path)
    assert again.code == 2 and "holds a search already" in again.err
    (tmp_path / "space.toml").write_text(SPACE.replace("trials = 2", "trials = 3"))
    changed = srl_rlvr(*words, "--resume", cwd=tmp_path)
    assert changed.code == 2 and "begun with another space file" in changed.err

    (tmp_path / "space.toml").write_text(SPACE)
    finished = srl_rlvr(*words, "--resume", cwd=tmp_path)
    assert finished.code == 0, finished.err
    trials = json.loads((tmp_path / "out" / "trials.json").read_text())
    assert len(trials) == 2 and all(row["done"] and not row["error"] for row in trials)
    assert trials[0]["updates"] == UPDATES and trials[0]["overrides"][1] == "stages.sft.batch_size=4"
    best = configs.load(tmp_path / "out" / "best.toml")
    assert f"stages.sft.learning_rate={best.stages[0].learning_rate}" == trials[0]["overrides"][0]
    assert (tmp_path / "out" / "trials" / "mlflow.db").is_file()
