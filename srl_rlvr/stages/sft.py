"""The warm-up: cross-entropy on whole worked solutions, so that the policy knows the form before it is rewarded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from srl_rlvr import model_types, records
from srl_rlvr.config import SftStage, SrlStage
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.stages import learning_rate, srl


def samples(
    examples: pa.Table, tokenizer: Any, think: bool, thoughts: Mapping[str, list[int]] | None = None
) -> pa.Table:
    """One Sample for each example: its prompt and its expert's solution (with empty monologues under `think`).

    With `thoughts`, tokens by the id of a step's prompt, they stand before the steps, and a solution ends before its
    first step that has none: an example whose first has none is left out.
    """
    rows, model_type = [], model_types.of(examples)
    empty = tokenizer.encode("<think></think>", add_special_tokens=False) if think else []
    for example in srl.with_steps(examples):
        solution = model_type.encode_solution(tokenizer, example, think)
        completion: list[int] = []
        for k, step in enumerate(solution.steps):
            thought = empty if thoughts is None else thoughts.get(srl.step_id(example["id"], k))
            if thought is None:
                break
            completion += [*thought, *step]
        if not completion:
            continue
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


def drawing(stage: SftStage) -> SrlStage:
    """How the thoughts are drawn: as SRL asks for single steps."""
    return SrlStage(kind="srl", name=stage.label, group_size=stage.samples, max_tokens=stage.max_tokens)


def update_spec(stage: SftStage, step: int) -> UpdateSpec:
    return UpdateSpec(loss="cross_entropy", learning_rate=learning_rate(stage, step))


def steps(stage: SftStage, examples: int) -> int:
    """Updates in the whole stage."""
    used = min(examples, stage.examples or examples)
    return -(-used * stage.epochs // stage.batch_size)
