"""The small base from its command, and a run on it with all that is not in the run that the other tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli_runs import rollouts, srl_rlvr

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


THINKING = """\
name = "thinking"
think = true
[model]
base = "{base}"
max_context = 256
[engine]
kind = "transformers"
threads = 1
[learner]
threads = 1
[[data]]
family = "basic_arithmetic"
train = 8
held_out = 4
[data.params]
min_terms = 3
max_terms = 3
min_digits = 1
max_digits = 1
operators = ["+"]
allow_parentheses = false
allow_negation = false
[[stages]]
kind = "sft"
own_thoughts = true
samples = 4
max_tokens = 48
[[stages]]
kind = "srl"
measure = "tokens"
steps = 2
prompts_per_step = 8
group_size = 4
max_tokens = 48
[[stages]]
kind = "srl"
name = "own"
measure = "tokens"
own_thoughts = true
steps = 2
prompts_per_step = 8
group_size = 4
max_tokens = 48
[evaluation]
max_tokens = 120
[tracking]
mlflow = false
"""


def test_a_policy_that_thinks_finds_its_own_thoughts_before_earlier_steps(tmp_path: Path) -> None:
    base = Path(__file__).parents[2] / "benchmarks" / "paper_table_thinking_base"
    (tmp_path / "run.toml").write_text(THINKING.format(base=base))
    finished = srl_rlvr("train", "run.toml", "--out", "out", cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert finished.out.count("drawing thoughts about the steps of 8 problems") == 2  # SFT and the second SRL
    rows = rollouts(tmp_path / "out")
    begun = {
        stage: [
            row["prompt"].rpartition("assistant\n")[2]
            for row in rows
            if row["stage"] == stage and not row["prompt_id"].endswith(":0")
        ]
        for stage in ("srl", "own")
    }
    assert begun["srl"] and not any("<think>" in text for text in begun["srl"])
    assert begun["own"] and any(text.startswith("<think>") and "</think>" in text for text in begun["own"])
    assert max(row["reward"] for row in rows) > 0.9


def test_a_base_that_sees_does_not_think_and_one_that_thinks_needs_thoughts(tmp_path: Path) -> None:
    sees = srl_rlvr("base", "build", "--think", "--vision", "photographs", "--out", "base", cwd=tmp_path)
    assert (sees.code, sees.err) == (
        2, "error: --vision draws a base that knows nothing yet: leave out --think and --family\n",
    )  # fmt: skip
    sorts = srl_rlvr("base", "build", "--think", "--family", "word_sorting", "--out", "base", cwd=tmp_path)
    assert (sorts.code, sorts.err) == (
        2,
        "error: family 'word_sorting' has no thoughts, which think asks for; "
        "basic_arithmetic, rewritten_sums, leg_counting have\n",
    )  # fmt: skip
    assert not list(tmp_path.iterdir())
