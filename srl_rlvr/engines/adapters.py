"""LoRA adapters that a sampling engine holds beside its layers: y + scale · (x Aᵀ) Bᵀ, with nothing merged.

New adapters are then served as soon as they have been copied. Merging reads and writes every weight of the model, and
where layers hold packed copies it packs them anew. What it costs instead is the adapters' own arithmetic in every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Adapter:
    """The adapters of one linear layer, whose output may be several projections side by side (query, key and value)."""

    def __init__(self, layer: torch.nn.Module):
        self._down: torch.Tensor | None = None  # [Σ rank, in]
        self._up: torch.Tensor | None = None  # [Σ rank, Σ out], scaled; a block for each projection
        self._layer = layer
        layer.register_forward_hook(self._add)

    def hold(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: float) -> None:
        """Serve these (A [rank, in], B [out, rank]), one pair for each projection, from the next pass on: copies."""
        device = next(self._layer.parameters()).device
        self._down = torch.cat([down for down, _ in pairs]).to(device)
        self._up = (torch.block_diag(*[up.t() for _, up in pairs]) * scale).to(device)

    def drop(self) -> None:
        self._down = self._up = None

    def _add(self, layer: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._down is None or self._up is None:
            return
        x, y = inputs[0], output[0] if isinstance(output, tuple) else output
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ self._down.t(), self._up)
