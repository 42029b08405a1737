"""The stages: what is asked of the policy and what is rewarded. Nothing else differs between them.

A stage turns Examples into Prompts (or, for the warm-up, into Samples) and names how to sample and how to update.
One loop in `pipeline` runs them all. Stages know tokens and configs; they never import Ray or a model.
"""

from __future__ import annotations

from srl_rlvr.config import PolicyGradientStage, StageConfig
from srl_rlvr.policies.losses import UpdateSpec

THINK_STOP = "</think>"


def learning_rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up to the stage's rate; `step` counts from 0."""
    return stage.learning_rate * min(1.0, (step + 1) / (stage.warmup_steps + 1))


def policy_gradient_spec(stage: PolicyGradientStage, step: int) -> UpdateSpec:
    return UpdateSpec(
        loss="policy_gradient",
        learning_rate=learning_rate(stage, step),
        temperature=stage.temperature,
        clip_low=stage.clip_low,
        clip_high=stage.clip_high,
        importance_cap=stage.importance_cap,
        kl=stage.kl,
        updates=stage.updates_per_batch,
        constant_length=stage.max_tokens if stage.advantage == "dr_grpo" else 0,
    )
