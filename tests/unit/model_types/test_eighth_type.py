"""A type is one file: the one in the README, as it stands there."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from srl_rlvr import config, model_types
from srl_rlvr.examples import sources
from srl_rlvr.stages import sft, srl
from srl_rlvr.verifiers import find_verifier

README = Path(__file__).parents[3] / "README.md"
ROW = {"question": "guten Morgen", "steps": ["guten: good", "Morgen: morning"], "answer": "good morning"}
RUN = """
model_type = "translator"
data = [{ path = "words.jsonl", held_out = 1 }]
stages = [{ kind = "sft" }, { kind = "srl" }, { kind = "rlvr" }]
"""


def test_the_file_of_the_readme_is_a_type(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, shown = README.read_text().partition("`srl_rlvr/model_types/translator.py`:\n\n")
    code = textwrap.dedent(shown[: shown.index("\n\n", shown.index("TYPE ="))])
    (tmp_path / "translator.py").write_text(code)
    monkeypatch.setattr(model_types, "__path__", [*model_types.__path__, str(tmp_path)])
    assert "translator" in model_types.names()

    rows = [ROW | {"question": f"{ROW['question']} {number}"} for number in range(3)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(RUN)
    run = config.load(tmp_path / "run.toml")
    tokenizer = model_types.find("translator").load_tokenizer(tiny_model, 1024)
    train, _, held_out = sources.load_all(run.data, run.seed, run.model_type)
    assert (train.num_rows, held_out.num_rows) == (2, 1)
    stage = run.stages[1]
    assert isinstance(stage, config.SrlStage)
    prompts = srl.prompts(train, tokenizer, stage, think=False)
    assert prompts.num_rows == 2 * 3 and "Translate the sentence" in tokenizer.decode(prompts["token_ids"][0].as_py())
    written = tokenizer.decode(sft.samples(train, tokenizer, think=False)["completion_ids"][0].as_py())
    assert written.startswith("guten: good\nMorgen: morning\nAnswer: good morning")
    example, answer = train.to_pylist()[0], written.removesuffix(tokenizer.eos_token)
    assert find_verifier(example["verifier"])(answer, example["reference"], {}).reward == 1
