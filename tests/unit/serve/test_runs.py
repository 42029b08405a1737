from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from serve import runs


def write(folder: Path, updates: int) -> None:
    folder.mkdir(parents=True)
    held_out = {"n": 4, "base": {"score": 0.0, "low": 0.0, "high": 0.5}, "srl": {"score": 0.5, "low": 0.2, "high": 0.8}}
    (folder / "result.json").write_text(json.dumps({"model_type": "task_llm", "minutes": 1.5, "held_out": held_out}))
    rows = [
        {"stage": "srl", "step": step, "reward": float(step), "dev": 0.5 if step % 500 == 499 else None, "other": 1.0}
        for step in range(updates)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "metrics.parquet")


def test_a_runs_scores_and_curves_are_read_and_what_is_no_whole_run_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "whole", 3)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "result.json").write_text("{")
    [found] = runs.read(tmp_path)
    assert found["name"] == "whole" and found["held_out"] == {"base": [0.0, 0.0, 0.5], "srl": [0.5, 0.2, 0.8]}
    assert found["curves"] == {"srl": {"reward": [(1, 0.0), (2, 1.0), (3, 2.0)]}}
    assert runs.read(tmp_path / "absent") == []


def test_long_curves_are_thinned_and_keep_their_end_and_rare_values_all(tmp_path: Path) -> None:
    write(tmp_path / "long", 2000)
    curves = runs.read(tmp_path)[0]["curves"]["srl"]
    assert len(curves["reward"]) == 400 and curves["reward"][-1] == (2000, 1999.0)
    assert curves["dev"] == [(500, 0.5), (1000, 0.5), (1500, 0.5), (2000, 0.5)]
