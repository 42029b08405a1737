from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from srl_rlvr import cli
from srl_rlvr.cli import predict
from srl_rlvr.cli.inference import Inference


def ask(model: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["predict", str(model), "--data", "q.jsonl", "--engine", "transformers", "--max-tokens", "4", *more])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_an_interrupted_prediction_leaves_the_answers_that_it_has(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q.jsonl").write_text("".join(json.dumps({"id": f"q{n}", "question": f"{n} + 1?"}) + "\n" for n in range(5)))
    monkeypatch.setattr(predict, "_AT_ONCE", 2)
    assert ask(tiny_model) == 0
    whole = capsys.readouterr().out

    calls = 0
    answer = Inference.answer

    def interrupted(self: Inference, prompts: pa.Table, spec: Any) -> pa.Table:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return answer(self, prompts, spec)

    with monkeypatch.context() as patched:
        patched.setattr(Inference, "answer", interrupted)
        assert ask(tiny_model, "--out", "a.jsonl") == 130
    assert "the answers before this are in a.jsonl.partial" in capsys.readouterr().err
    assert not Path("a.jsonl").exists()
    assert Path("a.jsonl.partial").read_text().splitlines() == whole.splitlines()[:4]

    assert ask(tiny_model, "--out", "a.jsonl") == 0
    assert Path("a.jsonl").read_text() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]
