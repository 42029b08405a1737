"""A vision tower learns from images alone, before anything is asked about them: SimCLR (Chen et al. 2020, eq. 1).

Two views of an image, turned, scaled, moved and tinted a little, are to be nearer to each other than to the views of
the other images of their batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from srl_rlvr.errors import InputError

if TYPE_CHECKING:
    import torch

BATCH = 128  # images, of two views each
TEMPERATURE = 0.1
TURN, SCALE, SHIFT, TINT = math.radians(20), 0.15, 0.06, 0.15  # at most: radians, and shares of 1, the side, the range


def pretrain(
    tower: Any,
    pixels: torch.Tensor,
    *,
    epochs: int,
    seed: int = 0,
    learning_rate: float = 1e-3,
    observe: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Train `tower` (pixel values → `last_hidden_state`) in place on `pixels` (images, channels, side, side), −1 to 1.

    `observe` is given each epoch, from 1 on, and its mean loss (nats). The same seed gives the same weights.
    Raises InputError where there are fewer than two images.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    if len(pixels) < 2:
        raise InputError(f"a tower learns to tell images apart from two or more, and the data has {len(pixels)}")
    torch.manual_seed(seed)
    width = tower.config.hidden_size
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width // 2))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=20)
    tower.train()
    for epoch in range(1, epochs + 1):
        losses: list[float] = []
        for batch in torch.randperm(len(pixels)).split(BATCH):
            if len(batch) < 2:
                continue
            both = torch.cat([view(pixels[batch]), view(pixels[batch])])
            # After post_layernorm, which LLaVA does not read: it acts as part of the head that SimCLR throws away.
            embedded = functional.normalize(head(tower(pixel_values=both).last_hidden_state.mean(1)), dim=1)
            similarity = (embedded @ embedded.T / TEMPERATURE).fill_diagonal_(-math.inf)
            partners = torch.arange(len(both)).roll(len(batch))
            loss = functional.cross_entropy(similarity, partners)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            warm_up.step()
            losses.append(loss.item())
        observe(epoch, sum(losses) / len(losses))
    tower.eval()


def view(pixels: torch.Tensor) -> torch.Tensor:
    """Each image (n, channels, side, side) turned, scaled, moved and tinted by draws of its own."""
    import torch
    from torch.nn import functional

    count, channels = pixels.shape[:2]

    def drawn(*shape: int, most: float) -> torch.Tensor:
        return (torch.rand(count, *shape) * 2 - 1) * most

    angle, scale = drawn(most=TURN), 1 + drawn(most=SCALE)
    across, down = drawn(most=2 * SHIFT), drawn(most=2 * SHIFT)  # a side is 2 long
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    places = torch.stack([cosine, -sine, across, sine, cosine, down], dim=1).view(count, 2, 3)
    grid = functional.affine_grid(places, list(pixels.shape), align_corners=False)
    moved = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved * (1 + drawn(1, 1, 1, most=2 * TINT)) + drawn(channels, 1, 1, most=2 * TINT)
