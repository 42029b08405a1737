"""Log-probabilities out of an output head, a few rows at a time.

The logits of a large vocabulary never exist all at once, neither forward nor backward, and the gradient of the head is
summed up in one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from srl_rlvr.policies import bfloat16

# Rows computed at once: 128 × 49,152 logits in fp32 are 25 MB.
_CHUNK = 128


def head_logprobs(
    head: torch.nn.Linear, hidden_T: torch.Tensor, targets_T: torch.Tensor, temperature: float
) -> torch.Tensor:
    """log softmax(head(hidden) / temperature)[target] in float32: [T, hidden size], [T] → [T]."""
    weight, bias = bfloat16.of(head)
    hidden_T = hidden_T.to(weight.dtype)
    return _HeadLogprobs.apply(hidden_T, weight, bias, targets_T, temperature)  # type: ignore[return-value]


class _HeadLogprobs(torch.autograd.Function):
    """Logits are computed again in the backward pass; of the forward pass only their log-sum-exp is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_T: torch.Tensor,
        weight: torch.Tensor,  # [V, hidden size]
        bias: torch.Tensor | None,  # [V]
        targets_T: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        normalizers_T = hidden_T.new_empty(len(hidden_T), dtype=torch.float32)
        logprobs_T = torch.empty_like(normalizers_T)
        for rows in _chunks(len(hidden_T)):
            logits = _logits(hidden_T[rows], weight, bias, temperature)
            normalizers_T[rows] = logits.logsumexp(dim=1)
            logprobs_T[rows] = logits.gather(1, targets_T[rows, None])[:, 0] - normalizers_T[rows]
        ctx.save_for_backward(hidden_T, weight, bias, targets_T, normalizers_T)
        ctx.temperature = temperature
        return logprobs_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d log π / d logit_v = (1[v = target] − softmax_v) / temperature."""
        hidden_T, weight, bias, targets_T, normalizers_T = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden_T) if needs_hidden else None
        d_weight = torch.zeros_like(weight) if needs_weight else None
        d_bias = torch.zeros_like(bias) if needs_bias else None
        for rows in _chunks(len(hidden_T)):
            upstream = grads[0][rows, None] / ctx.temperature
            d_logits = _logits(hidden_T[rows], weight, bias, ctx.temperature).sub_(normalizers_T[rows, None]).exp_()
            d_logits.mul_(-upstream).scatter_add_(1, targets_T[rows, None], upstream)
            d_logits = d_logits.to(weight.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight.addmm_(d_logits.t(), hidden_T[rows])
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
        return d_hidden, d_weight, d_bias, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).float().div_(temperature)


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, rows, _CHUNK))
