"""Each type beside the task LLM: trained, scored and asked by the commands, on tiny models and data made here."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runs import srl_rlvr
from PIL import Image

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
WORDS = ("ant", "bee", "cat", "dog", "eel", "fox")
STAGES = """
[[stages]]
kind = "sft"
batch_size = 8
learning_rate = 1e-3
[[stages]]
kind = "srl"
steps = 2
prompts_per_step = 4
group_size = 4
max_tokens = 40
expert_in_group = true
learning_rate = 1e-3
[[stages]]
kind = "rlvr"
steps = 2
prompts_per_step = 4
group_size = 4
max_tokens = 40
learning_rate = 1e-3
kl = 0.01
"""


def _rows(model_type: str, split: str, count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{model_type}/{split}")
    for number in range(count):
        word, other = rng.sample(WORDS, 2)
        text = f"{word} {number} {split}"
        if model_type == "intent_router":
            yield {"text": text, "label": "oos" if number % 5 == 4 else word}
        elif model_type == "reranker":
            candidates = list(WORDS)
            yield {"query": text, "candidates": candidates, "labels": [int(each == word) for each in candidates]}
        elif model_type == "embeddings":
            yield {"query": text, "positives": [word], "candidates": list(WORDS)}
        elif model_type == "extractor":
            yield {"text": text, "target": {"animal": word, "number": str(number)}}
        elif model_type == "multimodal_vision":
            colours = number % 3, number % 2
            yield {"image": _picture(number), "n_rows": colours[0], "n_columns": colours[1]}
        else:
            tokens = [word, "likes", other, str(number), split]
            roles = [{"role": "ARG0", "start": 0, "end": 1}, {"role": "ARG1", "start": 2, "end": 3}]
            yield {"tokens": tokens, "frames": [{"index": 1, "predicate": "likes", "args": roles}]}


def _picture(number: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8), (number, 40 * (number % 3), 90 * (number % 2))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("model_type", "metrics"),
    [
        ("intent_router", {"accuracy", "accepted_accuracy", "oos_recall", "ece"}),
        ("embeddings", {"ndcg@10", "mrr@10"}),
        ("reranker", {"ndcg@10", "mrr@10"}),
        ("extractor", {"f1", "field_f1", "valid", "exact"}),
        ("multimodal_vision", {"accuracy", "exact", "field_f1"}),
        ("srl_parser", {"f1", "predicate_f1", "role_f1", "valid", "exact"}),
    ],
)
def test_a_type_is_trained_scored_and_asked(
    model_type: str, metrics: set[str], tiny_model: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    names = {"train": "train", "dev": "dev"}
    if model_type == "embeddings":
        names = {"train": "queries_train", "dev": "queries_dev"}
        _write(data / "corpus.jsonl", ({"doc_id": word, "text": f"the {word}"} for word in WORDS))
    for split, name in names.items():
        rows = _rows(model_type, split, 30 if split == "train" else 10)
        _write(data / f"{name}.jsonl", (row | {"id": number} for number, row in enumerate(rows)))
    ranks = model_type in ("intent_router", "embeddings", "reranker")
    start = tiny_encoder if ranks else tiny_model
    if model_type == "multimodal_vision":
        start = tmp_path / "base"
        built = srl_rlvr("base", "build", "--vision", data, "--image-size", "32", "--out", start, cwd=tmp_path)
        assert built.code == 0, built.err
    base = f'[model]\nbase = "{start}"\nmax_context = {64 if ranks else 512}\n'
    stages, source = STAGES, f'[[data]]\npath = "{data}"\nheld_out = 10\ndev = 10\n'
    if model_type == "reranker":
        source += "ordered = true\n"
    elif ranks:
        stages = STAGES.replace('kind = "rlvr"', 'kind = "rlvr"\nhardest = 3')
    elif model_type == "extractor":
        base += 'lora_rank = 2\nmatmul = "bfloat16"\n'
    rest = f"[evaluation]\nmax_tokens = {2 if ranks else 40}\n"
    rest += '[engine]\nkind = "transformers"\n[tracking]\nmlflow = false\n'
    (tmp_path / "run.toml").write_text(f'model_type = "{model_type}"\n{base}{source}{stages}{rest}')
    trained = srl_rlvr("train", tmp_path / "run.toml", "--out", "out", cwd=tmp_path)
    assert trained.code == 0, trained.err
    model = tmp_path / "out" / "model"
    assert json.loads((model / "model_card.json").read_text())["model_type"] == model_type
    held_out = json.loads((tmp_path / "out" / "result.json").read_text())["held_out"]
    assert list(held_out) == ["n", "base", "sft", "srl", "rlvr"]

    found = json.loads(srl_rlvr("eval", model, "--data", data, "--json", "--engine", "transformers", cwd=tmp_path).out)
    assert found["model_type"] == model_type and metrics <= set(found["metrics"])
    assert all(0 <= value <= 1 for value in found["metrics"].values())
    assert found["metrics"][next(iter(found["metrics"]))] == pytest.approx(held_out["rlvr"]["score"], abs=1e-6)

    srl_rlvr("predict", model, "--data", data, "--out", "a.jsonl", "--engine", "transformers", cwd=tmp_path)
    predicted = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    answers = [row["answer"] for row in predicted]
    assert [row["id"] for row in predicted] == list(range(10))
    if model_type == "intent_router":
        assert all(set(answer) == {"label", "confidence"} and answer["label"] != "oos" for answer in answers)
    elif ranks:
        assert all(sorted(answer) == list(range(len(WORDS))) for answer in answers)
