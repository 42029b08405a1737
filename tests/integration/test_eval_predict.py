"""`eval` and `predict` on base and result, on a user's file and on GSM8K."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import ROOT, Finished, srl_rlvr

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's file in GSM8K's schema, with one problem twice."""
    file = tmp_path_factory.mktemp("questions") / "mine.jsonl"
    rows = [
        {"question": "Ann has 3 pens and buys 4. How many has she?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
        {"question": "A box holds 1,200 pins. How many do 2 hold?", "answer": "#### 2,400"},
        {"question": "Ann has 3 pens  and buys 4. How many has she?", "answer": "#### 7"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("which", ["base", "result"])
def test_eval_prints_one_object_of_the_fixed_shape(
    which: str, trained: Any, tiny_model: Path, questions: Path, tmp_path: Path
) -> None:
    model = tiny_model if which == "base" else trained.out / "model"
    finished = _transformers("eval", model, questions, tmp_path, "--json", "--max-tokens", 16)
    found = json.loads(finished.out)
    assert list(found) == ["model_type", "n", "metrics", "seconds"]
    assert found["model_type"] == "task_llm"
    assert found["n"] == 2
    assert list(found["metrics"]) == ["accuracy"]
    assert 0 <= found["metrics"]["accuracy"] <= 1
    assert found["seconds"] > 0


def test_predict_writes_one_line_for_each_problem_without_needing_answers(
    trained: Any, questions: Path, tmp_path: Path
) -> None:
    unanswered = tmp_path / "unanswered.jsonl"
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    unanswered.write_text(
        "".join(json.dumps({"id": f"q{i}", "question": r["question"]}) + "\n" for i, r in enumerate(rows))
    )
    finished = _transformers("predict", trained.out / "model", unanswered, tmp_path, "--out", "answers.jsonl")
    assert finished.out.strip() == "3 answers in answers.jsonl"
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["q0", "q1", "q2"]
    assert all(list(answer) == ["id", "prompt", "text", "answer"] for answer in answers)
    assert not list(tmp_path.glob("*.partial"))


def test_eval_reads_gsm8k_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    if not GSM8K.is_dir():
        pytest.skip(f"{GSM8K} is not there: this test needs the shared data")
    finished = _transformers(
        "eval", tiny_model, GSM8K, tmp_path, "--json", "--limit", 5, "--max-tokens", 8, "--max-context", 1000
    )
    assert json.loads(finished.out)["n"] == 5


def _transformers(command: str, model: Path, data: Path, folder: Path, *more: object) -> Finished:
    finished = srl_rlvr(command, model, "--data", data, "--engine", "transformers", *more, cwd=folder)
    assert finished.code == 0, finished.err
    assert finished.err in ("", f"{data.name}: rows dropped that repeat an earlier problem: 1\n")
    return finished
