"""The oracle: the update written plainly from the formulas, one sample and one token at a time, in float64.

It shares no code with srl_rlvr, and is slow on purpose. A sample is a plain dictionary:
prompt [ids], completion [ids], behavior [log-probabilities], advantage.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def advantages(rewards: list[float], kind: str) -> list[float]:
    mean = sum(rewards) / len(rewards)
    if kind == "grpo":
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
        return [(r - mean) / (std + 1e-6) for r in rewards]
    if kind == "dr_grpo":
        return [r - mean for r in rewards]
    return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]


def logprobs(model: Any, sample: dict[str, Any], temperature: float) -> list[torch.Tensor]:
    ids = sample["prompt"] + sample["completion"]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] / temperature
    start = len(sample["prompt"])
    return [torch.log_softmax(logits[start + t - 1], dim=0)[token] for t, token in enumerate(sample["completion"])]


def token_loss(new: Any, old: float, behavior: float, advantage: float, reference: float | None, o: Any) -> Any:
    weight = min(math.exp(old - behavior), o.importance_cap)
    ratio = torch.exp(new - old)
    clipped = torch.clamp(ratio, 1 - o.clip_low, 1 + o.clip_high)
    loss = -weight * torch.min(ratio * advantage, clipped * advantage)
    if reference is not None:
        loss = loss + o.kl * (torch.exp(reference - new) - (reference - new) - 1)
    return loss


def step_loss(model: Any, samples: list[Any], old: list[Any] | None, reference: list[Any] | None, o: Any) -> Any:
    """The scalar that one optimizer step descends: summed over tokens, divided by tokens (or samples × length)."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for i, sample in enumerate(samples):
        for t, new in enumerate(logprobs(model, sample, o.temperature)):
            if o.loss == "cross_entropy":
                total = total - new
            else:
                before = old[i][t] if old else float(new.detach())
                fixed = reference[i][t] if reference else None
                total = total + token_loss(new, before, sample["behavior"][t], sample["advantage"], fixed, o)
            tokens += 1
    return total / (len(samples) * o.constant_length if o.constant_length else tokens)


def preference_loss(model: Any, reference: Any, pairs: list[tuple[Any, Any]], o: Any) -> Any:
    """DPO's loss, the mean over (chosen, rejected) pairs."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        ratios = []
        for sample in pair:
            with torch.no_grad():
                fixed = sum(logprobs(reference, sample, o.temperature))
            ratios.append(sum(logprobs(model, sample, o.temperature)) - fixed)
        total = total - torch.log(torch.sigmoid(o.beta * (ratios[0] - ratios[1])))
    return total / len(pairs)
