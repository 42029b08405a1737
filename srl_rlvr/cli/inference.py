"""Answering without training: an engine and a verifier pool in this process, behind the pipeline's `sample`."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from srl_rlvr import engines, model_types, records
from srl_rlvr.cli.session import model_cache
from srl_rlvr.config import EngineConfig, EvaluationConfig, LearnerConfig, ModelConfig, VerifierConfig
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models
from srl_rlvr.verifiers.pool import VerifierPool


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model folder (`…/model` of a run), a Hugging Face id, or smollm2-135m-instruct",
    )
    parser.add_argument(
        "--data",
        metavar="FILE_OR_DIR",
        type=Path,
        required=True,
        help="problems (.jsonl, .jsonl.gz, .parquet; of a folder its dev file)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows that are wrong, and say how many")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N problems")
    parser.add_argument(
        "--engine", choices=("auto", "vllm", "transformers"), default="auto", help="auto: vLLM where it is installed"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, help="longest answer (default: as the model's card says)"
    )
    parser.add_argument(
        "--max-context", metavar="N", type=int, help="longest prompt and answer (default: as the card says)"
    )


@dataclass
class Inference:
    """An open model: `sample` answers prompts and scores the answers."""

    model: Path
    model_type: model_types.ModelType
    card: dict[str, Any]
    tokenizer: Any
    engine: engines.Engine
    pool: VerifierPool
    max_tokens: int
    max_context: int

    @property
    def think(self) -> bool:
        return bool(self.card.get("think", False))

    def sample(self, prompts: pa.Table, spec: SamplingSpec) -> tuple[pa.Table, pa.Table, dict[str, float]]:
        rollouts = self.answer(prompts, spec)
        return rollouts, self.pool.score(prompts, rollouts), {}

    def answer(self, prompts: pa.Table, spec: SamplingSpec) -> pa.Table:
        groups = self.engine.sample(prompts["token_ids"].to_pylist(), spec, engines.images_of(prompts))
        return engines.rollout_table(prompts, groups, self.engine.version, self.tokenizer)


@contextmanager
def open_model(options: argparse.Namespace) -> Iterator[Inference]:
    """Load MODEL as `options` say. Raises InputError where it is of no known type or cannot be loaded."""
    model = base_models.resolve(options.model, model_cache())
    card = base_models.read_card(model)
    model_type = _declared(model)
    for flag in ("limit", "max_tokens", "max_context"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise InputError(f"--{flag.replace('_', '-')} is {value}; it should be 1 or more")
    max_context = options.max_context or card.get("max_context", ModelConfig().max_context)
    max_tokens = options.max_tokens or card.get("max_tokens", EvaluationConfig().max_tokens)
    tokenizer = model_type.load_tokenizer(model, max_context)
    kind = model_type.engine or options.engine
    if kind == "auto":
        kind = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    arguments = engines.arguments(kind, EngineConfig(), max_context, LearnerConfig().tokens_per_microbatch)
    engine = engines.create(kind, model, arguments | model_type.policy_options())
    verifier = VerifierConfig()
    with VerifierPool(verifier.workers, verifier.deadline_s) as pool:
        yield Inference(model, model_type, card, tokenizer, engine, pool, max_tokens, max_context)


def declared(options: argparse.Namespace) -> tuple[model_types.ModelType, dict[str, Any]]:
    """What MODEL is for, and its card. Raises InputError where it is of no known type."""
    model = base_models.resolve(options.model, model_cache())
    return _declared(model), base_models.read_card(model)


def _declared(model: Path) -> model_types.ModelType:
    name = base_models.read_card(model).get("model_type", "task_llm")
    if name not in model_types.MODULES:
        raise InputError(f"model {model} is a {name}; there are {', '.join(model_types.MODULES)}")
    return model_types.find(name)


def check_fits(prompts: pa.Table, model: Inference) -> pa.Table:
    """Raises InputError naming the first prompt that leaves no room to answer."""
    if model.model_type.policy == "ranking":  # an encoder cuts its texts to the context
        return prompts
    max_context = model.max_context
    for prompt_id, token_ids in zip(prompts["id"].to_pylist(), prompts["token_ids"].to_pylist(), strict=True):
        if len(token_ids) >= max_context:
            raise InputError(
                f"problem {prompt_id} is {len(token_ids)} tokens long and the context is {max_context}: give a larger "
                "--max-context, or leave it out"
            )
    return records.check("Prompt", prompts)
