"""Linear layers that multiply in bfloat16: half the bits, and faster on CPUs with instructions for it (avx512_bf16,
amx_bf16). All that lies between them, attention, norms, LoRA's adapters and the loss, stays in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F


def hold(network: Any) -> None:
    """From now on every linear layer of `network` whose weights are not trained multiplies a copy of them in bfloat16.

    To be called again where those weights have changed.
    """
    linear: list[Any] = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    for layer in linear:
        if not layer.weight.requires_grad:
            bias = None if layer.bias is None else layer.bias.detach().bfloat16()
            layer.held = layer.weight.detach().bfloat16(), bias
            layer.forward = functools.partial(_multiply, *layer.held)


def of(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and bias that a linear layer multiplies: those that are held, or its own."""
    return getattr(layer, "held", (layer.weight, layer.bias))


def _multiply(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.bfloat16(), weight, bias).float()
