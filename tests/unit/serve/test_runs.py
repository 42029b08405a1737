from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serve import runs


def write(folder: Path, updates: int, **results: object) -> None:
    folder.mkdir(parents=True)
    held_out = {"n": 4, "base": {"score": 0.0, "low": 0.0, "high": 0.5}, "srl": {"score": 0.5, "low": 0.2, "high": 0.8}}
    result = {"model_type": "task_llm", "minutes": 1.5, "held_out": held_out} | results
    (folder / "result.json").write_text(json.dumps(result))
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


@pytest.mark.parametrize("result", ["[]", "3", "{}", '{"model_type": "x", "minutes": null, "held_out": []}'])
def test_a_result_of_another_form_is_left_out(tmp_path: Path, result: str) -> None:
    write(tmp_path / "whole", 3)
    write(tmp_path / "other", 3)
    (tmp_path / "other" / "result.json").write_text(result)
    assert [run["name"] for run in runs.read(tmp_path)] == ["whole"]


def test_values_that_json_does_not_know_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "run", 3, held_out={"base": {"score": float("nan"), "low": 0.0, "high": 1.0}})
    rows = [{"stage": "srl", "step": step, "loss": value} for step, value in enumerate([1.0, float("nan"), 2.0])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "run" / "metrics.parquet")
    [found] = runs.read(tmp_path)
    assert found["curves"] == {"srl": {"loss": [(1, 1.0), (3, 2.0)]}} and found["held_out"] == {}
    json.dumps(found, allow_nan=False)


def test_the_report_of_a_run_is_found_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder / "a run", 3)
    assert runs.report(folder, "a run") is None and not runs.read(folder)[0]["report"]
    for place in (folder / "a run", folder, tmp_path, folder / "no run"):
        place.mkdir(exist_ok=True)
        (place / "report.html").write_text("a report")
    assert runs.report(folder, "a run") == (folder / "a run" / "report.html").resolve()
    assert runs.read(folder)[0]["report"]
    names = ["", ".", "..", "../out/a run", "a run/", "/", "a run/../a run", "no run", "*", "a*", "a\0b"]
    names.append(str(folder / "a run"))
    assert [name for name in names if runs.report(folder, name)] == []


def test_a_report_that_is_a_link_out_of_the_folder_is_not_found(tmp_path: Path) -> None:
    folder, secret = tmp_path / "out", tmp_path / "secret"
    secret.write_text("secret")
    write(folder / "file", 3)
    (folder / "file" / "report.html").symlink_to(secret)
    write(tmp_path / "elsewhere", 3)
    (tmp_path / "elsewhere" / "report.html").write_text("a report")
    (folder / "run").symlink_to(tmp_path / "elsewhere")
    write(folder / "round", 3)
    (folder / "round" / "report.html").symlink_to(folder / "round" / "report.html")
    assert [runs.report(folder, name) for name in ("file", "run", "round")] == [None] * 3
    (tmp_path / "link").symlink_to(folder)
    (folder / "file" / "report.html").unlink()
    (folder / "file" / "report.html").write_text("a report")
    assert runs.report(tmp_path / "link", "file")  # the folder of runs itself may be a link
