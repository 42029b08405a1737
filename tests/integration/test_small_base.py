"""The small base from its command, and a run on it with all that is not in the run that the other tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli_runs import srl_rlvr

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

RUN = """\
name = "small"
[model]
base = "base"
max_context = 256
[engine]
kind = "transformers"
[[data]]
family = "sums"
train = 24
dev = 4
held_out = 4
[[stages]]
kind = "dpo"
steps = 2
prompts_per_step = 4
max_tokens = 24
[[stages]]
kind = "srl"
steps = 3
prompts_per_step = 4
group_size = 4
max_tokens = 16
curriculum = "informative"
[evaluation]
max_tokens = 24
every = 2
[tracking]
mlflow = false
"""


def test_dpo_dev_problems_and_curriculum_on_a_base_of_our_own(tmp_path: Path) -> None:
    built = srl_rlvr("base", "build", "--updates", 4, "--family", "sums", "--out", "base", cwd=tmp_path)
    assert built.code == 0, built.err
    assert "update     4 of 4" in built.out
    (tmp_path / "run.toml").write_text(RUN)
    finished = srl_rlvr("train", "run.toml", "--out", "out", cwd=tmp_path)
    assert finished.code == 0, finished.err
    rows = pq.read_table(tmp_path / "out" / "metrics.parquet").to_pylist()
    assert [(row["stage"], row["step"], row["dev"] is not None) for row in rows] == [
        ("dpo", 0, False), ("dpo", 1, True), ("srl", 0, False), ("srl", 1, True), ("srl", 2, True),
    ]  # fmt: skip
    assert all(row["preferred"] is not None and row["loss"] > 0 for row in rows if row["stage"] == "dpo")
    assert list(json.loads((tmp_path / "out" / "result.json").read_text())["held_out"]) == ["n", "base", "dpo", "srl"]
    again = srl_rlvr("base", "build", "--out", "base", cwd=tmp_path)
    assert (again.code, again.err) == (2, "error: base is there already; name another folder by --out\n")
