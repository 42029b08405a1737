"""Direct preference optimization (Rafailov et al., 2305.18290) on demonstrations: the expert's solution is preferred to
the policy's own wrong answer, drawn anew for each update (as in self-play fine-tuning, Chen et al., 2401.01335)."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from srl_rlvr import records
from srl_rlvr.config import DpoStage
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.stages import learning_rate


def sampling(stage: DpoStage, seed: int) -> SamplingSpec:
    return SamplingSpec(1, stage.temperature, stage.max_tokens, seed=seed)


def pairs(experts: dict[str, dict[str, Any]], rollouts: pa.Table, wrong: list[bool]) -> pa.Table:
    """Samples in pairs: the expert's solution (a row of `sft.samples`, by its prompt id) and the `wrong` answer."""
    rows = []
    for rollout, is_wrong in zip(rollouts.to_pylist(), wrong, strict=True):
        if is_wrong:
            chosen = experts[rollout["prompt_id"]]
            rejected = {
                "sample_index": 1,
                "policy_version": rollout["policy_version"],
                "completion_ids": rollout["token_ids"],
                "behavior_logprobs": rollout["logprobs"],
                "advantage": -1.0,
            }
            rows += [chosen, chosen | rejected]
    return records.build("Sample", rows)


def update_spec(stage: DpoStage, step: int) -> UpdateSpec:
    return UpdateSpec("preference", learning_rate(stage, step), beta=stage.beta)
