from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from srl_rlvr import model_types, records
from srl_rlvr.examples.files import InMemory, Reading
from srl_rlvr.examples.shown import example_input


def loaded(model_type: str, *rows: dict[str, Any], **card: Any) -> Any:
    return model_types.find(model_type).load(InMemory(list(rows)), "dev", Reading(card=card or None))


def test_a_question_is_shown_without_its_answer() -> None:
    table = loaded("task_llm", {"question": "x" * 3000, "answer": "1"}, {"question": "1 + 1", "answer": "2"})
    assert example_input(table) == {"prompt": "1 + 1"}
    assert example_input(table.slice(0, 1)) == {"prompt": "x" * 3000}
    assert example_input(table.slice(0, 0)) == {}


def test_what_is_too_long_is_not_shown() -> None:
    assert example_input(loaded("task_llm", {"question": "x" * 5000, "answer": "1"})) == {}


def test_a_ranking_is_shown_with_a_few_candidates_one_of_which_answers() -> None:
    row = {"query": "q", "candidates": [*"abcdefgh"], "labels": [0, 0, 0, 0, 0, 0, 1, 0]}
    found = example_input(loaded("reranker", row))
    assert found["prompt"] == "q" and len(found["candidates"]) == 4 and "g" in found["candidates"]


def test_a_text_is_shown_apart_from_its_schema() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": False}
    found = example_input(loaded("extractor", {"text": "Rome\nis old", "schema": schema, "target": {"city": "Rome"}}))
    assert found == {"prompt": "Rome\nis old", "schema": schema}
    of_its_own = {"question": "a\nb", "answer": "c", "metadata": {"schema": schema}}
    assert example_input(loaded("task_llm", of_its_own)) == {"prompt": "a\nb"}


def test_a_small_image_is_shown_and_a_large_one_is_not() -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    rows = [
        records.example(
            model_type="multimodal_vision", task="t", prompt="what?", steps=[], reference="red", verifier="exact",
            metadata={"schema": {}}, difficulty=1.0, provenance={"row": n}, images=[out.getvalue() + bytes(size)],
        )
        for n, size in enumerate((0, 100_000))
    ]  # fmt: skip
    table = records.build("Example", rows)
    assert example_input(table) == {"prompt": "what?", "image": base64.b64encode(out.getvalue()).decode()}
    assert example_input(table.slice(1)) == {"prompt": "what?"}
