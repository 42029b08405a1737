"""The vision type: what it asks, shows and reports."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from PIL import Image

from srl_rlvr import model_types, vision_base
from srl_rlvr.errors import InputError

TYPE = model_types.find("multimodal_vision")


def _image(width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 8)).save(buffer, "PNG")
    return buffer.getvalue()


EXAMPLE: dict[str, Any] = {
    "id": "x", "provenance": "", "prompt": "one two", "steps": ["one", "Answer: two"], "reference": "two",
    "verifier": "exact", "images": [_image(8), _image(20)],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base") / "vision"
    vision_base.build(folder, texts=["one two"], image_size=32, width=32, layers=1)
    return TYPE.load_tokenizer(folder, 300)


def test_each_image_has_its_places_before_the_question(tokenizer: Any) -> None:
    ids = TYPE.encode_prompt(tokenizer, EXAMPLE, think=False)
    assert ids.count(tokenizer.processor.image_token_id) == 2 * 16
    shown = TYPE.show(tokenizer, ids)
    assert shown.count("<image>") == 1 and "<image>one two" in shown


def test_the_actions_are_the_lines_of_the_answer(tokenizer: Any) -> None:
    solution = TYPE.encode_solution(tokenizer, EXAMPLE, think=False)
    assert solution.references == ["one\n", "Answer: two"]
    assert solution.prompt == TYPE.encode_prompt(tokenizer, EXAMPLE, think=False)


def test_text_that_would_stand_for_images_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="its text has <image> in it"):
        TYPE.encode_prompt(tokenizer, EXAMPLE | {"prompt": "what is <image>?"}, think=False)


def test_an_answer_is_presented_by_its_verifier() -> None:
    assert TYPE.present(EXAMPLE, {"text": "one\nAnswer: two"}, {}) == "two"
    assert TYPE.present(EXAMPLE | {"verifier": "fields"}, {"text": '{"a": 3}'}, {}) == {"a": 3}
    assert TYPE.present(EXAMPLE | {"verifier": "fields"}, {"text": "three"}, {}) is None


def test_metrics_count_right_answers_and_fields() -> None:
    counts = {"field_right": 1.0, "field_given": 2.0, "field_wanted": 2.0}
    half, whole = {"score": 0.5, "components": json.dumps(counts)}, {"score": 1.0, "components": "{}"}
    assert TYPE.metrics([half, whole], {}) == {"exact": 0.5, "field_f1": 0.5}
    assert TYPE.metrics([whole], {}) == {"exact": 1.0}
