"""Multimodal vision: images and a question in, lines that end with the answer out."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from srl_rlvr import images
from srl_rlvr.errors import InputError
from srl_rlvr.examples import visual
from srl_rlvr.examples.files import WHOLE, Reading, Source, Split
from srl_rlvr.model_types.kinds.text import StructuredType, TextType
from srl_rlvr.policies import base_models, chat
from srl_rlvr.records import PASSED


class ImageTokenizer:
    """A processor of texts with images, as the rest of the system knows tokenizers."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.eos_token_id = processor.tokenizer.eos_token_id
        self.decode = processor.tokenizer.decode
        self.conversation = functools.lru_cache(maxsize=4096)(self._conversation)

    def _conversation(self, system: str, asked: str, sizes: tuple[tuple[int, int], ...], think: bool) -> list[int]:
        """Up to the beginning of the assistant's answer. What an image takes up depends on its size alone."""
        from PIL import Image

        content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": asked}]
        messages = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": content},
        ]
        text = chat.render(self.processor, messages, think)
        blank = [Image.new("RGB", size) for size in sizes]
        return list(self.processor(text=text, images=blank, add_special_tokens=False)["input_ids"][0])

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return chat.encode_text(self.processor.tokenizer, text)

    def save_pretrained(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)


@dataclass(frozen=True)
class VisionType(TextType):
    engine: ClassVar[str] = "transformers"

    def load(self, path: Source, split: Split, how: Reading = WHOLE) -> pa.Table:
        return visual.load(path, split, how, self.name)

    def card(self, paths: Sequence[Path], predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return visual.card(paths)

    def load_tokenizer(self, model: Path, max_context: int) -> Any:
        return ImageTokenizer(base_models.load_processor(model))

    def encode_prompt(self, tokenizer: Any, example: Mapping[str, Any], think: bool) -> list[int]:
        marker = tokenizer.processor.image_token
        if marker in example["prompt"] or any(marker in step for step in example["steps"]):
            raise InputError(f"problem {example['id']} ({example['provenance']}): its text has {marker} in it, which "
                             "stands for images")  # fmt: skip
        if control := chat.control_token_in(tokenizer.processor.tokenizer, example["prompt"]):
            raise InputError(f"problem {example['id']} ({example['provenance']}): its text has {control} in it, a "
                             "control token of the model; take it out")  # fmt: skip
        sizes = tuple(images.size(image) for image in example["images"])
        return list(tokenizer.conversation(self.system(think), example["prompt"], sizes, think))

    def lines(self, example: Mapping[str, Any]) -> list[str]:
        return list(example["steps"])

    def score(self, reward: float) -> float:
        return max(reward, 0.0)

    def answer_schema(self, example: Mapping[str, Any]) -> dict[str, Any] | None:
        return json.loads(example["metadata"])["schema"] if example["verifier"] == "fields" else None

    def present(self, example: Mapping[str, Any], prediction: Mapping[str, Any], card: Mapping[str, Any]) -> Any:
        how: type[TextType] = StructuredType if example["verifier"] == "fields" else TextType
        return how.present(self, example, prediction, card)  # type: ignore[arg-type]

    def metrics(self, predictions: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> dict[str, float]:
        """The share of wholly right answers; F1 of fields over all answers that have some."""
        total = max(len(predictions), 1)
        found = {"exact": sum(prediction["score"] >= PASSED for prediction in predictions) / total}
        counts = [json.loads(prediction["components"]) for prediction in predictions]
        right, given, wanted = (
            sum(of.get(f"field_{what}", 0.0) for of in counts) for what in ("right", "given", "wanted")
        )
        return found | ({"field_f1": 2 * right / (given + wanted)} if given + wanted else {})

    def show(self, tokenizer: Any, tokens: list[int]) -> str:
        """An image's many tokens as one."""
        marker = re.escape(tokenizer.processor.image_token)
        return re.sub(f"({marker})+", r"\1", tokenizer.decode(tokens))


TYPE = VisionType(
    name="multimodal_vision",
    metric="accuracy",
    instruction="Look and answer. The last line is 'Answer: ' and the result, where no JSON is asked for.",
    base="vision-smollm2-135m-instruct",
)
