"""One run through all three stages: what it leaves, prints and tracks."""

from __future__ import annotations

import json
from typing import Any

import pyarrow.parquet as pq
import pytest
from cli_runs import UPDATES

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def test_a_run_leaves_everything_that_is_promised(trained: Any) -> None:
    out = trained.out
    assert {entry.name for entry in out.iterdir() if not entry.name.startswith(".")} >= {
        "model", "report.html", "result.json", "metrics.parquet", "config.json", "checkpoints",
    }  # fmt: skip
    assert {entry.name for entry in (out / "model").iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "model_card.json",
    }  # fmt: skip
    assert not [entry for entry in out.rglob(".*") if entry.name.startswith((".model", ".update"))]
    assert "<html" in (out / "report.html").read_text()[:2000]
    card = json.loads((out / "model" / "model_card.json").read_text())
    assert list(card["example"]) == ["prompt"] and card["example"]["prompt"]


def test_result_json_has_the_keys_of_the_contract(trained: Any) -> None:
    result = json.loads((trained.out / "result.json").read_text())
    assert list(result) == ["model_type", "held_out", "minutes", "peak_memory_gib", "sampled_tokens"]
    assert list(result["held_out"]) == ["n", "base", "sft", "srl", "rlvr"]
    assert result["model_type"] == "task_llm"
    assert result["held_out"]["n"] == 6
    for label in ("base", "sft", "srl", "rlvr"):
        rate = result["held_out"][label]
        assert list(rate) == ["score", "low", "high"]
        assert 0 <= rate["low"] <= rate["score"] <= rate["high"] <= 1
    assert 0 < result["peak_memory_gib"] < 7
    assert result["sampled_tokens"] > 0


def test_metrics_hold_each_update_once_with_reward_and_divergence(trained: Any) -> None:
    rows = pq.read_table(trained.out / "metrics.parquet").to_pylist()
    wanted = [(label, step) for label, steps in UPDATES.items() for step in range(steps)]
    assert [(row["stage"], row["step"]) for row in rows] == wanted
    for row in rows:
        if row["stage"] == "sft":
            assert row["reward"] is None
            continue
        assert row["reward_std"] > 0
        assert row["staleness"] == 0
        assert row["scored"] + row["invalid"] + row["failed"] == row["groups_drawn"] * 4
        # The engine is transformers in float32, as the learner is: what differs is rounding.
        assert abs(row["divergence"]) < 1e-6
    assert all(row["kl"] > 0 for row in rows if row["stage"] == "rlvr" and row["step"] > 0)


def test_the_command_shows_progress_and_ends_with_the_table(trained: Any) -> None:
    text = trained.finished.out
    assert "srl    4/4" in text and "rlvr   4/4" in text
    table = text[text.index("model  pass rate") :]
    assert [line.split()[0] for line in table.splitlines()[1:5]] == ["base", "sft", "srl", "rlvr"]
    assert "peak memory" in table and "report.html" in table
    assert trained.finished.err == ""


def test_no_process_of_the_run_is_left(trained: Any) -> None:
    assert trained.finished.family, "the run's processes were not seen at all"
    assert trained.finished.survivors() == []


def test_mlflow_holds_parameters_metrics_card_and_a_model_version(trained: Any) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    client = mlflow.MlflowClient(f"sqlite:///{trained.out.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("srl-rlvr")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["stages.rlvr.kl"] == "0.05"
    assert {"sft/loss", "srl/reward", "rlvr/pass_rate", "held_out/rlvr"} <= set(run.data.metrics)
    assert len(client.get_metric_history(run.info.run_id, "srl/reward")) == UPDATES["srl"]
    files = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "result.json", "metrics.parquet", "config.json"} <= files
    assert "model/model_card.json" in {file.path for file in client.list_artifacts(run.info.run_id, "model")}
    version = client.get_model_version_by_alias("tiny", "newest")
    assert version.run_id == run.info.run_id
