"""Run by test_vllm.py: samples from vLLM before and after new weights, and has the learner judge each token."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srl_rlvr import records
from srl_rlvr.cli.session import model_cache
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.engines.vllm_engine import VllmEngine
from srl_rlvr.model_types import task_llm
from srl_rlvr.policies import base_models
from srl_rlvr.policies.text import TextPolicy

QUESTIONS = ["Calculate 3 + 4 - 2.", "How many letters has the word parrot?"]
TEMPERATURE = 0.8
SPEC = SamplingSpec(samples=3, temperature=TEMPERATURE, max_tokens=24, seed=5)


def main() -> None:
    model = base_models.resolve("smollm2-135m-instruct", model_cache())
    tokenizer = base_models.load_tokenizer(model)
    prompts = [task_llm.TYPE.encode_prompt(tokenizer, {"prompt": question}, think=False) for question in QUESTIONS]
    engine = VllmEngine(model, max_running=8, max_context=256, kv_cache_gib=0.25, block_size=32)
    base = TextPolicy(model, tokens_per_microbatch=512)
    seen: dict[str, Any] = {"base": _compare(base, prompts, engine.sample(prompts, SPEC))}

    again, other = engine.sample(prompts, SPEC), engine.sample(prompts, SamplingSpec(3, TEMPERATURE, 24, seed=6))
    seen["same_seed_same_tokens"] = _tokens(again) == _tokens(engine.sample(prompts, SPEC))
    seen["other_seed_other_tokens"] = _tokens(again) != _tokens(other)
    seen["cached_tokens"] = _cached_tokens(engine, prompts[0])
    lines = engine.sample(prompts, SamplingSpec(2, TEMPERATURE, 64, stops=("e",), seed=7))
    ended = [
        completion
        for group in lines
        for completion in group
        if completion.finish_reason == "stop" and completion.token_ids[-1] != tokenizer.eos_token_id
    ]
    seen["stopped"] = [[tokenizer.decode(c.token_ids[:-1]), tokenizer.decode(c.token_ids[-1:])] for c in ended]

    full = TextPolicy(model, tokens_per_microbatch=512)
    _disturb(full, 0.05)
    seen["full"] = _handed_over(engine, full, base, prompts)
    lora = TextPolicy(model, tokens_per_microbatch=512, lora_rank=8)
    _disturb(lora, 0.05)
    seen["lora"] = _handed_over(engine, lora, base, prompts)
    seen["full after lora"] = _handed_over(engine, full, base, prompts)
    Path(sys.argv[1]).write_text(json.dumps(seen))


def _handed_over(engine: VllmEngine, policy: TextPolicy, base: TextPolicy, prompts: list[list[int]]) -> dict[str, Any]:
    buffer, manifest = policy.export()
    served = engine.load(buffer, manifest)
    cached_tokens = _cached_tokens(engine, prompts[0])
    groups = engine.sample(prompts, SPEC)
    found = _compare(policy, prompts, groups)
    gap_to_base = _compare(base, prompts, groups)["largest_gap"]
    hand_over = {"served": served, "sent": manifest.checksum, "cached_tokens": cached_tokens}
    return found | hand_over | {"gap_to_base": gap_to_base}


def _cached_tokens(engine: VllmEngine, prompt: list[int]) -> int:
    """How much of the prompt vLLM does not compute again."""
    from vllm import SamplingParams

    (output,) = engine.engine.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1), use_tqdm=False)
    return output.num_cached_tokens or 0


@torch.no_grad()
def _disturb(policy: TextPolicy, size: float) -> None:
    """Moves every trained tensor, embeddings and tied head too, by noise of `size` times its own spread."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.network.parameters():
        if parameter.requires_grad:
            spread = float(parameter.std()) if parameter.std() > 0 else 0.02
            parameter += size * spread * torch.randn(parameter.shape, generator=generator)


def _compare(policy: TextPolicy, prompts: list[list[int]], groups: Any) -> dict[str, float]:
    rows = [
        {
            "prompt_id": str(p), "sample_index": i, "trunk_id": str(p), "policy_version": 0, "prompt_ids": prompt,
            "completion_ids": completion.token_ids, "behavior_logprobs": completion.logprobs, "advantage": 0.0,
        }
        for p, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        for i, completion in enumerate(group)
    ]  # fmt: skip
    learners = np.concatenate(policy.logprobs(records.build("Sample", rows), TEMPERATURE))
    engines = np.concatenate([row["behavior_logprobs"] for row in rows])
    return {"tokens": len(engines), "largest_gap": float(np.abs(learners - engines).max())}


def _tokens(groups: Any) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


if __name__ == "__main__":
    main()
