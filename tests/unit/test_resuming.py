from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file
from unit.scripted import problems

from srl_rlvr import config as configs
from srl_rlvr import records, resuming

RUN = {"name": "run", "data": [{"path": "x.jsonl", "dev": 4}], "stages": [{"kind": "srl"}, {"kind": "rlvr"}]}


def changed(**settings: Any) -> list[tuple[str, bool]]:
    before, now = configs.parse(RUN, "run"), configs.parse(RUN | settings, "run")
    return [(change.key, change.is_allowed) for change in resuming.changes(before, now)]


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "another"},
        {"model": {"base": "/moved/base"}},
        {"data": [{"path": "/moved/x.jsonl", "held_out_path": "/moved/y.jsonl", "dev": 4, "skip_bad": True}]},
        {"cluster": {"address": "auto", "cpus_per_learner": 4.0}},
        {"tracking": {"mlflow": False, "rollouts_per_step": 0}},
        {"verifier": {"workers": 8}},
        {"engine": {"start_deadline_s": 9.0, "call_deadline_s": 9.0}},
        {"learner": {"start_deadline_s": 9.0, "call_deadline_s": 9.0, "max_restarts": 9}},
        {"checkpoint_every": 3, "evaluation": {"on_stages": False}},
    ],
)
def test_where_and_how_long_it_runs_may_change(settings: dict[str, Any]) -> None:
    assert changed(**settings) == []


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"engine": {"max_running": 2}}, "engine.max_running"),
        ({"engine": {"kv_cache_gib": 0.5}}, "engine.kv_cache_gib"),
        ({"engine": {"generators": 2}}, "engine.generators"),
        ({"engine": {"threads": 1}}, "engine.threads"),
        ({"learner": {"tokens_per_microbatch": 64}}, "learner.tokens_per_microbatch"),
        ({"learner": {"activation_checkpointing": True}}, "learner.activation_checkpointing"),
        ({"learner": {"workers": 2}}, "learner.workers"),
        ({"evaluation": {"patience": 3}}, "evaluation.patience"),
        ({"max_staleness": 1}, "max_staleness"),
    ],
)
def test_what_changes_the_last_bits_is_allowed_and_named(settings: dict[str, Any], key: str) -> None:
    assert changed(**settings) == [(key, True)]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"think": True}, "think"),
        ({"model": {"max_context": 64}}, "model.max_context"),
        ({"model": {"lora_rank": 8}}, "model.lora_rank"),
        ({"learner": {"weight_decay": 0.1}}, "learner.weight_decay"),
        ({"evaluation": {"max_tokens": 9}}, "evaluation.max_tokens"),
        ({"stages": [{"kind": "srl"}, {"kind": "rlvr", "learning_rate": 1e-3}]}, "stages.rlvr.learning_rate"),
        ({"stages": [{"kind": "srl", "measure": "words"}, {"kind": "rlvr"}]}, "stages.srl.measure"),
        ({"stages": [{"kind": "rlvr"}, {"kind": "srl"}]}, "stages"),
        ({"stages": [{"kind": "srl"}]}, "stages"),
    ],
)
def test_other_mathematics_is_refused_by_its_key(settings: dict[str, Any], key: str) -> None:
    assert changed(**settings)[0] == (key, False)


def test_a_change_tells_both_values() -> None:
    before, now = configs.parse(RUN, "run"), configs.parse(RUN | {"seed": 7}, "run")
    (change,) = resuming.changes(before, now)
    assert str(change) == "'seed' (it was 0, and is 7)"


def digest(table: pa.Table) -> str:
    return resuming.data_digest(resuming.fingerprints(table, table[:0], table[:0]), table)


def with_changes(table: pa.Table, row: int, **values: Any) -> pa.Table:
    rows = table.to_pylist()
    rows[row] |= values
    return records.build("Example", rows)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"reference": "9"}, "another answer or verifier"),
        ({"verifier": "exact"}, "another answer or verifier"),
        ({"metadata": '{"x": 1}'}, "another answer or verifier"),
        ({"steps": ["other"]}, "another steps"),
        ({"images": [b"png"]}, "another question"),
        ({"candidates": ["c"]}, "another question"),
        ({"prompt": "0 +  1 + 1"}, "another question"),
        ({"id": "new"}, "is new"),
    ],
)
def test_whatever_of_a_problem_changes_is_noticed_and_named(values: dict[str, Any], said: str) -> None:
    table = problems(4)
    other = with_changes(table, 2, **values)
    assert digest(other) != digest(table)
    before, now = (resuming.fingerprints(each, each[:0], each[:0]) for each in (table, other))
    found = resuming.first_change(before, now, other)
    assert said in found and (values.get("id") or table["id"][2].as_py()) in found


def test_fewer_more_and_moved_problems_are_named() -> None:
    table = problems(4)

    def first(other: pa.Table) -> str:
        before, now = (resuming.fingerprints(each, each[:0], each[:0]) for each in (table, other))
        return resuming.first_change(before, now, other)

    assert "is missing" in first(table[:3]) and "is new" in first(problems(5))
    swapped = table.take([1, 0, 2, 3])
    assert "another place" in first(swapped) and digest(swapped) != digest(table)


def test_where_a_problem_comes_from_does_not_count() -> None:
    table = problems(4)
    moved = records.build("Example", [row | {"task": "moved", "provenance": '{"x": 1}'} for row in table.to_pylist()])
    assert digest(moved) == digest(table)
    assert digest(with_changes(table, 1, task="another")) != digest(table)  # levels of a curriculum are by task


def test_fingerprints_are_read_as_written(tmp_path: Path) -> None:
    table = problems(4)
    found = resuming.fingerprints(table, table[:1], table[:0])
    resuming.write_fingerprints(tmp_path / "p.parquet", found)
    assert resuming.read_fingerprints(tmp_path / "p.parquet") == found
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    assert resuming.read_fingerprints(tmp_path / "p.parquet") is None
    assert resuming.read_fingerprints(tmp_path / "missing") is None


def test_a_base_is_its_contents_wherever_it_lies(tiny_model: Path, tmp_path: Path) -> None:
    before = resuming.model_digest(tiny_model)
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    (moved / "README.md").write_text("a note")
    (moved / "checkpoint-7").mkdir()
    (moved / "checkpoint-7" / "config.json").write_text("{}")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    assert resuming.model_digest(moved) == before
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert resuming.model_digest(moved) != before


def test_any_tensor_of_a_base_counts(tiny_model: Path, tmp_path: Path) -> None:
    before = resuming.model_digest(tiny_model)
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    weights = load_file(tiny_model / "model.safetensors")
    for name in weights:
        save_file(weights | {name: weights[name] * 1.5}, moved / "model.safetensors")
        assert resuming.model_digest(moved) != before, name


def test_a_tokenizer_and_its_template_count(tiny_model: Path, tmp_path: Path) -> None:
    before = resuming.model_digest(tiny_model)
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    assert resuming.model_digest(moved) != before


def test_weights_that_are_no_safetensors_have_a_digest(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    pointer = resuming.model_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resuming.model_digest(tmp_path) != pointer
