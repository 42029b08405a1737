"""Sampling engines: token ids in, token ids and their log-probabilities out. They know neither stages nor rewards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from srl_rlvr import records
from srl_rlvr.config import EngineConfig
from srl_rlvr.errors import InputError
from srl_rlvr.policies.weights import Manifest

# What vLLM says when it cannot start, and the keys of ours that change it. Its own advice names flags of its own.
_START_ADVICE = (
    (r"less than requested memory for kv|No available memory for the cache", "lower kv_cache_gib, or free memory"),
    (r"KV cache is needed|available KV cache memory", "raise kv_cache_gib, or lower max_context"),
    (r"max_model_len|max seq len|max_position_embeddings", "lower max_context"),
    (r"block[ _]size", "change engine.block_size"),
    (r"allocate memory|out of memory|Cannot allocate|MemoryError", "free memory, or lower max_running or kv_cache_gib"),
)
_OTHERS_ADVICE = re.compile(r"[\s.;,]*\b(?:Try|Please|Decrease|Increase|Consider|See|To allow)\b.*", re.DOTALL)


@dataclass(frozen=True)
class SamplingSpec:
    """What one batch of prompts is asked for."""

    samples: int
    temperature: float  # 0 = greedy
    max_tokens: int
    # Texts that end a completion one after the other: ("</think>", "\n") reads up to </think>, then up to the line
    # break. Without any, and always, the end-of-text token ends it.
    stops: tuple[str, ...] = ()
    seed: int = 0


@dataclass
class Completion:
    token_ids: list[int]
    logprobs: list[float]  # natural, at the spec's temperature
    finish_reason: str  # stop | length


class Engine(Protocol):
    version: int

    def sample(
        self, prompts: list[list[int]], spec: SamplingSpec, images: Sequence[Sequence[bytes]] = ()
    ) -> list[list[Completion]]:
        """`spec.samples` completions of each prompt, in order. The same weights, prompts and spec give the same.

        `images` are those of each prompt, or none at all. Raises InputError where the engine takes none.
        """
        ...

    def load(self, buffer: np.ndarray | torch.Tensor, manifest: Manifest) -> str:
        """Serve the weights in `buffer` (flat, float32) from now on; returns the checksum of what arrived."""
        ...


def arguments(kind: str, engine: EngineConfig, max_context: int, tokens_per_pass: int) -> dict[str, Any]:
    """What `create` is to be given for an engine of this kind."""
    if kind == "ranking":
        return {"tokens_per_pass": tokens_per_pass}
    return {
        "max_running": engine.max_running,
        "max_context": max_context,
        "kv_cache_gib": engine.kv_cache_gib,
        "block_size": engine.block_size,
    } | ({"gpu_memory_utilization": engine.gpu_memory_utilization} if kind == "vllm" else {})


def create(kind: str, model: Path, config: dict[str, Any]) -> Engine:
    """The engine `kind`: "vllm", "transformers" or "ranking". Raises MissingExtraError where it is not installed."""
    if kind == "ranking":
        from srl_rlvr.engines.ranking_engine import RankingEngine

        return RankingEngine(model, **config)
    if kind == "vllm":
        from srl_rlvr.engines.vllm_engine import VllmEngine

        return VllmEngine(model, **config)
    from srl_rlvr.engines.transformers_engine import TransformersEngine

    return TransformersEngine(model, **config)


def start_advice(cause: str) -> str:
    """Return why an engine does not start, in one line, with the keys to change in the place of vLLM's flags."""
    advice = next((advice for pattern, advice in _START_ADVICE if re.search(pattern, cause)), "")
    line = " ".join(cause.split())
    return f"{_OTHERS_ADVICE.sub('', line)}; {advice}" if advice else line


def images_of(prompts: pa.Table) -> list[list[bytes]]:
    """Those of each prompt, or nothing where no prompt has any."""
    found = prompts["images"].to_pylist()
    return found if any(found) else []


def rollout_table(prompts: pa.Table, groups: list[list[Completion]], version: int, tokenizer: Any) -> pa.Table:
    """Rollout table of the completions of `prompts`, in order."""
    rows = [
        {
            "prompt_id": prompt_id,
            "sample_index": index,
            "policy_version": version,
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "text": tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            "finish_reason": completion.finish_reason,
        }
        for prompt_id, group in zip(prompts["id"].to_pylist(), groups, strict=True)
        for index, completion in enumerate(group)
    ]
    return records.build("Rollout", rows)


def check_room(prompts: list[list[int]], max_context: int) -> None:
    """Raises InputError where a prompt fills the context alone."""
    longest = max(map(len, prompts), default=0)
    if longest >= max_context:
        raise InputError(
            f"a prompt of {longest} tokens leaves no room to answer in a context of {max_context}: raise "
            "model.max_context, or leave its problem out"
        )


def in_segments(
    one_segment: Any, prompts: list[list[int]], spec: SamplingSpec, max_context: int
) -> list[list[Completion]]:
    """Sample up to each of `spec.stops` in turn with `one_segment(prompts, samples, max_tokens, stop)`.

    A completion that ends by a stop that is not the last goes on from where it is; the tokens stand as they were
    sampled. Prompt and completion keep within `max_context`. Raises InputError where a prompt fills it alone.
    """
    check_room(prompts, max_context)
    stops = spec.stops or ("",)
    limits = [min(spec.max_tokens, max_context - len(prompt)) for prompt in prompts]
    groups = one_segment(prompts, [spec.samples] * len(prompts), limits, stops[0])
    for stop in stops[1:]:
        open_ones = []
        for prompt, limit, (group, ended) in zip(prompts, limits, groups, strict=True):
            for i, completion in enumerate(group):
                if ended[i] and len(completion.token_ids) < limit:
                    open_ones.append((prompt, limit, completion))
                elif ended[i]:
                    completion.finish_reason, ended[i] = "length", False
        continued = one_segment(
            [prompt + completion.token_ids for prompt, _, completion in open_ones],
            [1] * len(open_ones),
            [limit - len(completion.token_ids) for _, limit, completion in open_ones],
            stop,
        )
        by_stop_now = {}
        for (_, _, completion), (group, ended) in zip(open_ones, continued, strict=True):
            completion.token_ids += group[0].token_ids
            completion.logprobs += group[0].logprobs
            completion.finish_reason = group[0].finish_reason
            by_stop_now[id(completion)] = ended[0]
        for group, ended in groups:
            ended[:] = [by_stop_now.get(id(completion), False) for completion in group]
    return [group for group, _ in groups]
