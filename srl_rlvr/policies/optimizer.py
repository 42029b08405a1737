"""AdamW (Loshchilov and Hutter, 1711.05101) as every policy uses it. Knows parameters only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

BETAS = (0.9, 0.99)


def new_optimizer(
    parameters: Sequence[torch.nn.Parameter], betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW at learning rate 0; `weight_decay` applies to parameters of two or more dimensions only."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas)
