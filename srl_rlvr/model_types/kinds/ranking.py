"""Types whose answer is an ordering of candidates: what they have in common.

A question's tokens and its candidates' make the prompt; the expert's actions are picks, best first, one for each
candidate that has a gain. SFT on them is ListMLE, and with one pick cross-entropy over the candidates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from srl_rlvr import records
from srl_rlvr.examples import rankings
from srl_rlvr.examples.files import WHOLE, Reading, Source, Split
from srl_rlvr.model_types import ModelType, Solution
from srl_rlvr.policies import base_models
from srl_rlvr.policies.questions import Question, pack, unpack
from srl_rlvr.verifiers.orderings import CUTOFF

_CHARACTERS_READ = 4  # for each token of the context: a pair of such texts is no work
_MARGIN = 64  # tokens by which a text is cut too late: the last word before the cut is not read as it was meant


class CandidateTokenizer:
    """Texts to tokens, each text once; orderings to text. `prompt` stands before every text (of a pair the first), as
    the encoder was trained with it."""

    def __init__(self, tokenizer: Any, max_context: int, prompt: str = ""):
        self.tokenizer, self.prompt = tokenizer, prompt
        self.max_context = min(max_context, tokenizer.model_max_length)
        tokenizer.model_max_length = self.max_context  # saved with the model: whoever loads it cuts texts alike
        self._tokens: dict[tuple[str, ...], tuple[int, ...]] = {}

    def encode(self, *texts: str) -> tuple[int, ...]:
        """A text, or a pair of texts, with the model's special tokens, cut to the context and to the model's own."""
        if texts not in self._tokens:
            [self._tokens[texts]] = self.encode_many([texts])
        return self._tokens[texts]

    def encode_many(self, texts: Sequence[tuple[str, ...]]) -> list[tuple[int, ...]]:
        """As `encode` of each, all texts or all pairs; nothing is kept."""
        first, *others = map(list, zip(*texts, strict=True))
        first = [self.prompt + text for text in first]
        if others:
            first, *others = zip(*map(self._shortened, first, *others), strict=True)
        columns = map(list, (first, *others))
        found = self.tokenizer(*columns, truncation=True, max_length=self.max_context)
        return list(map(tuple, found["input_ids"]))

    def _shortened(self, *pair: str) -> list[str]:
        """Two long texts without the ends that are not read: the tokenizer would make every pair of their pieces, to
        return the first (tokenizers 0.23). The longer one stays the longer: it has the odd token."""
        if min(map(len, pair)) <= _CHARACTERS_READ * self.max_context:
            return list(pair)
        spans = [
            self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            for text in pair
        ]
        rooms = [self.max_context + _MARGIN * (1 + (len(of_text) == max(map(len, spans)))) for of_text in spans]
        return [
            text[: of_text[room - 1][1]] if len(of_text) > room else text
            for text, of_text, room in zip(pair, spans, rooms, strict=True)
        ]

    def decode(self, picks: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, picks))

    def show(self, tokens: list[int]) -> str:
        """A prompt for people: the question and the candidates, a line each."""
        question = unpack(tokens)
        texts = [self.tokenizer.decode(text, skip_special_tokens=True) for text in question.candidates]
        asked = self.tokenizer.decode(question.question, skip_special_tokens=True)
        picked = f"\npicked: {self.decode(list(question.picked))}" if question.picked else ""
        return "\n".join([asked, *(f"{number}: {text}" for number, text in enumerate(texts))]) + picked

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class RankingType(ModelType):
    name: str
    metric: str
    kind: Literal["bi", "cross"]
    verifier: str = "ndcg"
    base: str = "all-minilm-l6-v2"
    shares_candidates: bool = False  # a batch's questions are asked with each other's candidates, too
    takes_order: bool = False
    policy: ClassVar[str] = "ranking"
    engine: ClassVar[str] = "ranking"
    step_verifier: ClassVar[str] = "pick"

    def load(self, path: Source, split: Split, how: Reading = WHOLE) -> pa.Table:
        return rankings.load(
            path, split, self.name, self.verifier, candidates=how.candidates, limit=how.limit,
            labels=(how.card or {}).get("labels"), unanswered=how.unanswered, skip_bad=how.skip_bad,
            ordered=how.ordered or bool((how.card or {}).get("ordered")),
        )  # fmt: skip

    @property
    def picks(self) -> int:
        return {"label": 1, "ndcg": CUTOFF, "reciprocal_rank": CUTOFF}.get(self.verifier, 0)

    def policy_options(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def load_tokenizer(self, model: Path, max_context: int) -> CandidateTokenizer:
        tokenizer, prompt = base_models.load_encoder_tokenizer(model, self.kind)
        return CandidateTokenizer(tokenizer, max_context, prompt)

    def encode_prompt(self, tokenizer: CandidateTokenizer, example: Mapping[str, Any], think: bool) -> list[int]:
        asked, candidates = example["prompt"], example["candidates"]
        ranks = tuple(json.loads(example["metadata"]).get("ranks", ()))
        if self.kind == "cross":
            return pack(Question((), tuple(tokenizer.encode(asked, text) for text in candidates), ranks=ranks))
        return pack(Question(tokenizer.encode(asked), tuple(map(tokenizer.encode, candidates)), ranks=ranks))

    def encode_solution(self, tokenizer: CandidateTokenizer, example: Mapping[str, Any], think: bool) -> Solution:
        picks = [int(step) for step in example["steps"]]
        return Solution(
            self.encode_prompt(tokenizer, example, think),
            [[pick] for pick in picks],
            [example["reference"]] * len(picks),
        )

    def score(self, reward: float) -> float:
        return max(reward, 0.0)

    def present(self, example: Mapping[str, Any], prediction: Mapping[str, Any], card: Mapping[str, Any]) -> Any:
        """The candidates' numbers, best first."""
        return [int(number) for number in prediction["text"].split()]

    def metrics(self, predictions: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> dict[str, float]:
        """The means of what the verifier names."""
        found = [json.loads(prediction["components"]) for prediction in predictions]
        return {name: float(np.mean([of[name] for of in found if of])) for name in next(filter(None, found), {})}

    def show(self, tokenizer: CandidateTokenizer, tokens: list[int]) -> str:
        return tokenizer.show(tokens)

    def step_metadata(self, solution: Solution, k: int, think: bool, measure: str) -> dict[str, Any]:
        return {"taken": [pick for step in solution.steps[:k] for pick in step]}

    def narrowed(self, examples: pa.Table, orderings: Mapping[str, Sequence[int]], others: int) -> pa.Table:
        """Each example with what answers it and the first so many other candidates of its ordering, by id.

        Ids stay; candidates, the expert's picks, the reference and costs are numbered anew.
        """
        rows = examples.to_pylist()
        for row in rows:
            gains = {int(number): gain for number, gain in json.loads(row["reference"]).items()}
            wrong = [number for number in orderings[row["id"]] if number not in gains]
            kept = sorted([*gains, *wrong[:others]])
            new = {number: position for position, number in enumerate(kept)}
            row["candidates"] = [row["candidates"][number] for number in kept]
            row["steps"] = [str(new[int(step)]) for step in row["steps"]]
            row["reference"] = json.dumps({str(new[number]): gain for number, gain in gains.items()})
            metadata = json.loads(row["metadata"])
            costs = {int(number): cost for number, cost in metadata.get("costs", {}).items()}
            if costs:
                metadata["costs"] = {str(new[number]): cost for number, cost in costs.items() if number in new}
                row["metadata"] = json.dumps(metadata)
        return records.build("Example", rows)

    def together(self, batch: pa.Table, column: str) -> pa.Table:
        """Every question with the candidates of all: its own keep their numbers, the others' come after them.

        A question's own hold everything that it is known to be answered by, so that what comes in addition is wrong
        for it, as far as is known.
        """
        if not self.shares_candidates:
            return batch
        questions = [unpack(tokens) for tokens in batch[column].to_pylist()]
        everyone = list(dict.fromkeys(text for question in questions for text in question.candidates))
        token_ids = []
        for question in questions:
            own = set(question.candidates)
            others = tuple(text for text in everyone if text not in own)
            token_ids.append(pack(replace(question, candidates=question.candidates + others)))
        index = batch.schema.get_field_index(column)
        lists = pa.array([np.array(ids, np.int32) for ids in token_ids], batch.schema.field(index).type)
        return batch.set_column(index, batch.schema.field(index), lists)
