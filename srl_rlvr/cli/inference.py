"""Answering without training: an engine and a verifier pool in this process, behind the pipeline's `sample`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from srl_rlvr import engines, records, trained
from srl_rlvr.cli.session import model_cache
from srl_rlvr.config import EngineConfig, VerifierConfig
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models
from srl_rlvr.trained import Trained
from srl_rlvr.verifiers import check_own
from srl_rlvr.verifiers.pool import VerifierPool


@dataclass
class Inference:
    """An open model: `sample` answers prompts and scores the answers."""

    model: Trained
    tokenizer: Any
    engine: engines.Engine
    pool: VerifierPool

    def sample(self, prompts: pa.Table, spec: SamplingSpec) -> tuple[pa.Table, pa.Table, dict[str, float]]:
        rollouts = self.answer(prompts, spec)
        return rollouts, self.pool.score(prompts, rollouts), {}

    def answer(self, prompts: pa.Table, spec: SamplingSpec) -> pa.Table:
        groups = self.engine.sample(prompts["token_ids"].to_pylist(), spec, engines.images_of(prompts))
        return engines.rollout_table(prompts, groups, self.engine.version, self.tokenizer)


def read_model(options: argparse.Namespace) -> Trained:
    """What MODEL is. Raises InputError where it is of no known type."""
    for flag in ("limit", "max_tokens", "max_context"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise InputError(f"--{flag.replace('_', '-')} is {value}; it should be 1 or more")
    try:
        check_own(options.verifier)
    except ValueError as error:
        raise InputError(f"--verifier {error}") from None
    folder = base_models.resolve(options.model, model_cache())
    return trained.read(folder, options.max_context, options.max_tokens)


@contextmanager
def open_model(model: Trained, engine: str = "auto", verifiers: Sequence[str] = ()) -> Iterator[Inference]:
    """Raises InputError where it cannot be loaded. `verifiers` are the user's own that problems may name."""
    tokenizer = model.load_tokenizer()
    opened = model.open_engine(model.engine_kind(engine), EngineConfig())
    verifier = VerifierConfig()
    with VerifierPool(verifier.workers, verifier.deadline_s, verifiers) as pool:
        yield Inference(model, tokenizer, opened, pool)


def check_fits(prompts: pa.Table, model: Trained) -> pa.Table:
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
