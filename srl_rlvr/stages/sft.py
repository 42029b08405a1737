"""The warm-up: cross-entropy on whole worked solutions, so that the policy knows the form before it is rewarded."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from srl_rlvr import model_types, records
from srl_rlvr.config import SftStage
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.stages import learning_rate, srl


def samples(examples: pa.Table, tokenizer: Any, think: bool) -> pa.Table:
    """One Sample for each example: its prompt and its expert's solution (with empty monologues under `think`)."""
    rows, model_type = [], model_types.of(examples)
    opening = tokenizer.encode("<think></think>", add_special_tokens=False) if think else []
    for example in srl.with_steps(examples):
        solution = model_type.encode_solution(tokenizer, example, think)
        completion = [token for step in solution.steps for token in (*opening, *step)]
        rows.append(
            {
                "prompt_id": example["id"],
                "sample_index": 0,
                "trunk_id": example["id"],
                "policy_version": 0,
                "prompt_ids": solution.prompt,
                "images": example["images"],
                "completion_ids": completion,
                "behavior_logprobs": [0.0] * len(completion),
                "advantage": 1.0,
            }
        )
    return records.build("Sample", rows)


def update_spec(stage: SftStage, step: int) -> UpdateSpec:
    return UpdateSpec(loss="cross_entropy", learning_rate=learning_rate(stage, step))


def steps(stage: SftStage, examples: int) -> int:
    """Updates in the whole stage."""
    used = min(examples, stage.examples or examples)
    return -(-used * stage.epochs // stage.batch_size)
