"""What a model is for: one declaration for each type. A declaration says what a question and an answer are, how an
expert's work is cut into actions, what verifies them, and which policy learns.

To add a type, write a file here whose `TYPE` is a `TextType`, a `StructuredType` or a `RankingType` (of `kinds`), or a
`ModelType` of its own: a module of this folder is a type, by its name. Nothing here knows Ray, stages or the pipeline,
and none imports torch, so that a run file is checked in no time.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from srl_rlvr.examples.files import WHOLE, Reading, Source, Split


@dataclass(frozen=True)
class Solution:
    """An expert's work in tokens, action by action."""

    prompt: list[int]
    steps: list[list[int]]
    references: list[str]  # of each step: what its verifier compares with

    def trunk(self, k: int) -> list[int]:
        """The tokens that step k is asked after: the problem and the steps before it."""
        return self.prompt + [token for step in self.steps[:k] for token in step]


class ModelType:
    """What a declaration answers. What has a body here is what most types have."""

    name: str
    policy: str  # text | ranking
    engine: str = ""  # the only one that runs it, where not all that a run may name do
    metric: str  # of the held-out problems: what the verifier's rewards are the mean of
    step_verifier: str
    base: str  # where the run names none
    picks: int = 0  # of an ordering, that its verifier reads; 0: no limit is known, or it writes text
    shortens: bool = False  # `model.dimensions` trains its vectors to be cut
    takes_order: bool = False  # `data.ordered`: the order in which its candidates come counts
    one_card: bool = False  # what may be asked for, as labels and fields, is the same in all data of a run
    calibrates: bool = False  # its card needs the trained model's answers to the dev problems

    def load(self, path: Source, split: Split, how: Reading = WHOLE) -> pa.Table:
        """The Examples of a file or of a folder's `split`. Raises InputError naming file, row and column."""
        raise NotImplementedError

    def policy_options(self) -> dict[str, Any]:
        """Further arguments of the policy and of its engine."""
        return {}

    def score(self, reward: float) -> float:
        """What an evaluation counts an answer for, in [0, 1]."""
        raise NotImplementedError

    def counts(self, example: Mapping[str, Any]) -> bool:
        """Whether an evaluation's mean is over this example, too."""
        return True

    def metrics(self, predictions: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> dict[str, float]:
        """Metrics beside `metric` of an evaluation's predictions that were judged, of the model with this card."""
        return {}

    def over_corpus(self, engine: Any, tokenizer: Any, path: Path, how: Reading) -> list[dict[str, Any]] | None:
        """Predictions of the dev split of `path` where the type is judged over a whole corpus; None elsewhere."""
        return None

    def card(self, paths: Sequence[Path], predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a model's card has to hold beside what all have: of its data, and of its answers to the dev problems."""
        return {}

    def present(self, example: Mapping[str, Any], prediction: Mapping[str, Any], card: Mapping[str, Any]) -> Any:
        """The answer, for whoever asked."""
        raise NotImplementedError

    def answer_schema(self, example: Mapping[str, Any]) -> dict[str, Any] | None:
        """The JSON Schema of the answer's text; None where it is no JSON."""
        return None

    def step_metadata(self, solution: Solution, k: int, think: bool, measure: str) -> dict[str, Any]:
        """What the verifier of step k is told beside its reference."""
        raise NotImplementedError

    def show(self, tokenizer: Any, tokens: list[int]) -> str:
        """A prompt for people."""
        raise NotImplementedError

    def load_tokenizer(self, model: Path, max_context: int) -> Any:
        raise NotImplementedError

    def encode_prompt(self, tokenizer: Any, example: Mapping[str, Any], think: bool) -> list[int]:
        """The tokens of the question."""
        raise NotImplementedError

    def encode_solution(self, tokenizer: Any, example: Mapping[str, Any], think: bool) -> Solution:
        raise NotImplementedError

    def narrowed(self, examples: pa.Table, orderings: Mapping[str, Sequence[int]], others: int) -> pa.Table:
        """Examples with what answers them and so many of their other candidates, the first of these orderings."""
        return examples

    def together(self, batch: pa.Table, column: str) -> pa.Table:
        """The batch with what its prompts, the tokens in `column`, are to share."""
        return batch


def names() -> list[str]:
    """Of all types, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def find(name: str) -> ModelType:
    """The declaration of that name."""
    return importlib.import_module(f"{__name__}.{name}").TYPE


def of(examples: pa.Table) -> ModelType:
    """The declaration that these examples are of."""
    return find(examples["model_type"][0].as_py())
