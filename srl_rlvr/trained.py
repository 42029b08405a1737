"""A model's folder: what it is for and how long its answers are, as its card says."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srl_rlvr import engines, model_types
from srl_rlvr.config import EngineConfig, EvaluationConfig, LearnerConfig, ModelConfig
from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models

CARD = "model_card.json"
_WRITERS = ("CausalLM", "LMHead", "ConditionalGeneration", "ImageTextToText", "Vision2Seq")  # in an architecture's name


@dataclass(frozen=True)
class Trained:
    folder: Path
    model_type: model_types.ModelType
    card: dict[str, Any]
    max_context: int  # tokens of prompt and answer
    max_tokens: int  # of the answer

    @property
    def think(self) -> bool:
        return bool(self.card.get("think", False))

    def engine_kind(self, asked: str = "auto") -> str:
        """`auto`: vLLM where it is installed, but for types that only one engine runs."""
        kind = self.model_type.engine or asked
        if kind == "auto":
            kind = "vllm" if importlib.util.find_spec("vllm") else "transformers"
        return kind

    def load_tokenizer(self) -> Any:
        return self.model_type.load_tokenizer(self.folder, self.max_context)

    def open_engine(self, kind: str, options: EngineConfig) -> engines.Engine:
        arguments = engines.arguments(kind, options, self.max_context, LearnerConfig().tokens_per_microbatch)
        return engines.create(kind, self.folder, arguments | self.model_type.policy_options())


def adapter_of(folder: Path, base: Path) -> Path:
    """The LoRA adapters that were merged into a model's weights, in PEFT's layout.

    Raises InputError without any, or where they were trained on another base: what adapters leave as it is (norms and
    biases) should be the base's. (A base whose weights are no safetensors is taken at its word.)
    """
    found = folder / "adapter"
    if not (found / "adapter_config.json").is_file():
        raise InputError(f"model {folder} has no adapters beside its weights: train it with model.lora_rank above 0, "
                         "or leave 'base' out")  # fmt: skip
    vectors, of_base = _vectors(folder), _vectors(base)
    if any(not vectors[name].equal(of_base[name]) for name in vectors.keys() & of_base.keys()):
        raise InputError(f"model {folder} was not trained from {base}: 'base' should be the one it was trained from")
    return found


def _vectors(model: Path) -> dict[str, Any]:
    """Its weights of one dimension."""
    from safetensors import safe_open

    found = {}
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            named = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 1]  # noqa: SIM118
            found |= {name: file.get_tensor(name).float() for name in named}
    return found


def read(folder: Path, max_context: int | None = None, max_tokens: int | None = None) -> Trained:
    """Raises InputError where it is of no known type."""
    card = base_models.read_card(folder)
    if "model_type" not in card and (folder / "config.json").is_file():
        _check_writes(folder)
    name = str(card.get("model_type", "task_llm"))
    if name not in model_types.names():
        raise InputError(f"model {folder} is a {name}; there are {', '.join(model_types.names())}")
    return Trained(
        folder,
        model_types.find(name),
        card,
        max_context or card.get("max_context", ModelConfig().max_context),
        max_tokens or card.get("max_tokens", EvaluationConfig().max_tokens),
    )


def _check_writes(folder: Path) -> None:
    """Raises InputError if a model without a card, which is taken for one that writes text, is an encoder."""
    architectures = [str(name) for name in base_models.read_config(folder).get("architectures") or ()]
    if architectures and not any(writes in name for name in architectures for writes in _WRITERS):
        raise InputError(
            f"model {folder} is an encoder ({architectures[0]}) and has no {CARD} that says what it is for: train it "
            f'with model_type embeddings, reranker or intent_router, or write {{"model_type": "embeddings"}} into '
            f"{CARD} in a copy of the folder"
        )
