"""Group-relative advantages. Pure numpy; knows neither tokens nor where a reward came from."""

from __future__ import annotations

from typing import Literal

import numpy as np

AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]

# Keeps the quotient finite where a group barely deviates; dynamic sampling has already left out those that do not.
_STD_FLOOR = 1e-6


def group_advantages(rewards_G: np.ndarray, kind: AdvantageKind) -> np.ndarray:
    """Advantages [G] of one group's rewards [G], in the order given.

    grpo:    (r - mean) / std           Shao et al. 2024 (2402.03300), section 4.1.2
    dr_grpo: r - mean                   Liu et al. 2025 (2503.20783), section 3
    rloo:    r_i - mean of the others   Ahmadian et al. 2024 (2402.14740), eq. 8

    Only rewards of verdicts that did not fail belong here. Raises ValueError for fewer than two.
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if rewards.ndim != 1 or rewards.size < 2:
        raise ValueError(f"a group needs at least 2 rewards in one dimension, not shape {rewards.shape}")
    centered = rewards - rewards.mean()
    if kind == "grpo":
        return (centered / (rewards.std() + _STD_FLOOR)).astype(np.float32)
    if kind == "dr_grpo":
        return centered.astype(np.float32)
    return (centered * rewards.size / (rewards.size - 1)).astype(np.float32)
