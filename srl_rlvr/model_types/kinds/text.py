"""Types whose answer is text, written line by line: what they have in common.

The question is the user's turn, the expert's actions are lines of the assistant's answer. Each line is tokenized on its
own, so every step prompt is a true prefix of one token sequence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from srl_rlvr.examples import files, structures
from srl_rlvr.examples.files import WHOLE, Reading, Source, Split
from srl_rlvr.model_types import ModelType, Solution
from srl_rlvr.policies import base_models, chat
from srl_rlvr.records import PASSED
from srl_rlvr.verifiers.answers import extract_answer, without_thoughts
from srl_rlvr.verifiers.structures import read_json

_THINKING = " Before each step think between <think> and </think>."


@dataclass(frozen=True)
class TextType(ModelType):
    name: str
    metric: str
    instruction: str
    last_line: str = "Answer: {}"  # of an answer: how the reference is written
    base: str = "smollm2-135m-instruct"
    policy: ClassVar[str] = "text"
    step_verifier: ClassVar[str] = "similarity"

    def load(self, path: Source, split: Split, how: Reading = WHOLE) -> pa.Table:
        return files.load(path, split, how.limit, self.name, how.unanswered, how.skip_bad)

    def load_tokenizer(self, model: Path, max_context: int) -> Any:
        return base_models.load_tokenizer(model)

    def encode_prompt(self, tokenizer: Any, example: Mapping[str, Any], think: bool) -> list[int]:
        """Token ids of the conversation up to the beginning of the assistant's answer."""
        messages = [
            {"role": "system", "content": self.system(think)},
            {"role": "user", "content": example["prompt"]},
        ]
        return chat.prompt_ids(tokenizer, messages, think)

    def system(self, think: bool) -> str:
        return self.instruction + (_THINKING if think else "")

    def lines(self, example: Mapping[str, Any]) -> list[str]:
        """The expert's answer."""
        return [*example["steps"], self.last_line.format(example["reference"])]

    def encode_solution(self, tokenizer: Any, example: Mapping[str, Any], think: bool) -> Solution:
        """The expert's lines and the last, tokenized: each ends with its line break, the last with the end of text.

        The references keep line breaks, as the similarity compares them.
        """
        *before, last = self.lines(example)
        texts = [*(f"{line}\n" for line in before), last]
        steps = [chat.encode_text(tokenizer, text) for text in texts]
        steps[-1] = [*steps[-1], tokenizer.eos_token_id]
        return Solution(self.encode_prompt(tokenizer, example, think), steps, texts)

    def score(self, reward: float) -> float:
        return float(reward >= PASSED)

    def present(self, example: Mapping[str, Any], prediction: Mapping[str, Any], card: Mapping[str, Any]) -> Any:
        """What stands after the last `Answer:`, or where an answer is written otherwise."""
        return extract_answer(prediction["text"])

    def step_metadata(self, solution: Solution, k: int, think: bool, measure: str) -> dict[str, Any]:
        return {"think": think, "measure": measure}

    def show(self, tokenizer: Any, tokens: list[int]) -> str:
        return tokenizer.decode(tokens)


@dataclass(frozen=True)
class StructuredType(TextType):
    """The answer is JSON over lines: the expert's steps are the whole of it."""

    one_card: ClassVar[bool] = True
    verifier: Literal["fields", "frames"] = "fields"
    parts: tuple[str, ...] = ("field",)  # that its verifier counts

    def score(self, reward: float) -> float:
        return max(reward, 0.0)

    def lines(self, example: Mapping[str, Any]) -> list[str]:
        return list(example["steps"])

    def load(self, path: Source, split: Split, how: Reading = WHOLE) -> pa.Table:
        return structures.load(path, split, self.name, self.verifier, how)

    def card(self, paths: Sequence[Path], predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The fields, for texts that come without a schema."""
        return structures.card(paths) if self.verifier == "fields" else {}

    def present(self, example: Mapping[str, Any], prediction: Mapping[str, Any], card: Mapping[str, Any]) -> Any:
        """The JSON, or null where it is none."""
        try:
            return read_json(without_thoughts(prediction["text"]))
        except ValueError:
            return None

    def answer_schema(self, example: Mapping[str, Any]) -> dict[str, Any] | None:
        return json.loads(example["metadata"]).get("schema", structures.FRAMES)

    def metrics(self, predictions: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> dict[str, float]:
        """F1 of each kind of part over all answers together, and the shares of valid and of wholly right ones."""
        counts: dict[str, float] = {}
        for prediction in predictions:
            for name, value in json.loads(prediction["components"]).items():
                counts[name] = counts.get(name, 0.0) + value
        total = max(len(predictions), 1)
        found = {name: counts.get(name, 0.0) / total for name in ("valid", "exact")}
        for name in self.parts:
            right, given, wanted = (counts.get(f"{name}_{what}", 0.0) for what in ("right", "given", "wanted"))
            found[f"{name}_f1"] = 2 * right / (given + wanted) if given + wanted else 1.0
        return found
