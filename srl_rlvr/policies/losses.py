"""Losses over sampled tokens. Pure torch; knows neither models nor batches: vectors of tokens in, sums out.

`T` is the number of completion tokens in the vectors, whatever samples they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

# Of an update, over completion tokens; `drawn` is how many of them an engine drew.
SUMS: tuple[str, ...] = ("loss", "kl", "clip_fraction", "entropy", "divergence", "drawn")


LARGEST_LOG_RATIO = 20.0
"""exp(20) is 5e8. In float32 exp overflows at 88.7."""


@dataclass(frozen=True)
class UpdateSpec:
    """How one batch of samples moves the policy."""

    loss: Literal["policy_gradient", "cross_entropy", "preference"]
    learning_rate: float
    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    importance_cap: float = 2.0
    kl: float = 0.0
    beta: float = 0.1  # of the preference loss
    updates: int = 1
    # Dr. GRPO divides by samples × this length, not by the tokens that happened to be sampled; 0 = by tokens.
    constant_length: int = 0


@dataclass(frozen=True)
class TokenLoss:
    """Sums over tokens: `loss` carries the gradient, the rest are for metrics."""

    loss: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor


def policy_gradient_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    behavior_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    reference_logprobs_T: torch.Tensor | None,
    spec: UpdateSpec,
) -> TokenLoss:
    """Sum over tokens of the clipped policy loss, with truncated importance weights and k3 KL.

    For each token, with π the policy now, π_old the same policy at the start of the batch as the *learner*
    computes it, π_b the behaviour policy as the *engine* recorded it, and A the sample's advantage:

        w    = min(π_old / π_b, importance_cap)                 Yao et al. 2025, truncated importance sampling
        ρ    = π / π_old
        L    = -w · min(ρ·A, clip(ρ, 1 - clip_low, 1 + clip_high)·A)      DAPO (2503.14476), eq. 8
        L   += kl · (π_ref/π - log(π_ref/π) - 1)                          k3, GRPO (2402.03300), eq. 4

    All inputs are [T], natural logarithms at the sampling temperature; only `logprobs_T` carries gradient. Above
    `LARGEST_LOG_RATIO` both ratios go on as straight lines, so that one token cannot overflow the loss.
    """
    weight = torch.exp(old_logprobs_T - behavior_logprobs_T).clamp(max=spec.importance_cap)
    ratio = _exp(logprobs_T - old_logprobs_T)
    clipped_ratio = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    surrogate = torch.minimum(ratio * advantages_T, clipped_ratio * advantages_T)
    loss = -(weight * surrogate).sum()
    kl = torch.zeros((), device=logprobs_T.device)
    if reference_logprobs_T is not None:
        log_ratio = reference_logprobs_T - logprobs_T
        k3 = (_exp(log_ratio) - log_ratio - 1).sum()
        loss = loss + spec.kl * k3
        kl = k3.detach()
    clipped = (clipped_ratio * advantages_T < ratio * advantages_T).sum()
    return TokenLoss(loss, kl, clipped)


def _exp(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """exp, continued above `LARGEST_LOG_RATIO` by its tangent: finite, and its gradient keeps its direction."""
    bounded_T = log_ratio_T.clamp(max=LARGEST_LOG_RATIO)
    return torch.exp(bounded_T) * (1 + (log_ratio_T - bounded_T))


def cross_entropy_loss(logprobs_T: torch.Tensor) -> TokenLoss:
    """Sum of -log π over the expert's tokens."""
    return likelihood_loss(logprobs_T, torch.ones_like(logprobs_T))


def likelihood_loss(logprobs_T: torch.Tensor, weights_T: torch.Tensor) -> TokenLoss:
    """Sum of -weight · log π."""
    zero = torch.zeros((), device=logprobs_T.device)
    return TokenLoss(-(weights_T * logprobs_T).sum(), zero, zero)


def preference_weights(log_ratios_P_2: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [P], weights [P, 2]) of pairs of answers, chosen and rejected: DPO (Rafailov et al., 2305.18290), eq. 7.

    `log_ratios_P_2` is log π/π_ref of each whole answer. With the margin m = β (chosen - rejected), the loss is
    -log σ(m), and its gradient that of `likelihood_loss` with the weights ±β σ(-m): so answers that share a loss need
    not share a pass.
    """
    margins_P = beta * (log_ratios_P_2[:, 0] - log_ratios_P_2[:, 1])
    weights_P = beta * torch.sigmoid(-margins_P)
    return -torch.nn.functional.logsigmoid(margins_P), torch.stack([weights_P, -weights_P], dim=1)


def averages(sums: Mapping[str, float], tokens: int, denominator: float) -> dict[str, float]:
    """The metrics that `SUMS` come to: the loss by its `denominator`, what compares engine and policy by what was
    drawn, the rest by `tokens`."""
    drawn = max(sums["drawn"], 1.0)
    of_drawn = {name: sums[name] / drawn for name in ("entropy", "divergence")}
    of_tokens = {name: sums[name] / tokens for name in ("kl", "clip_fraction")}
    return {"loss": sums["loss"] / denominator} | of_tokens | of_drawn


def check_finite(metrics: Mapping[str, float], version: int) -> None:
    """Raises ValueError naming what is not finite."""
    for what in ("loss", "grad_norm"):
        if not math.isfinite(metrics[what]):
            raise ValueError(f"the {what} of version {version} is {metrics[what]}; lower the learning rate")
