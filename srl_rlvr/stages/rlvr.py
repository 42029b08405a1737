"""Reinforcement learning with verifiable rewards: the whole problem is asked, the problem's own verifier rewards."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from srl_rlvr import model_types, records
from srl_rlvr.config import RlvrStage
from srl_rlvr.engines import SamplingSpec


def prompts(examples: pa.Table, tokenizer: Any, label: str, think: bool, invalid_reward: float = 0.0) -> pa.Table:
    """One Prompt for each example. Evaluation asks with the same."""
    rows, model_type = [], model_types.of(examples)
    for example in examples.to_pylist():
        token_ids = model_type.encode_prompt(tokenizer, example, think)
        rows.append(
            {
                "id": example["id"],
                "example_id": example["id"],
                "stage": label,
                "step_index": -1,
                "token_ids": token_ids,
                "images": example["images"],
                "trunk_id": example["id"],
                "offset": len(token_ids),
                "verifier": example["verifier"],
                "reference": example["reference"],
                "metadata": json.dumps({**json.loads(example["metadata"]), "invalid_reward": invalid_reward}),
            }
        )
    return records.build("Prompt", rows)


def sampling(stage: RlvrStage, seed: int) -> SamplingSpec:
    return SamplingSpec(stage.group_size, stage.temperature, stage.max_tokens, seed=seed)
