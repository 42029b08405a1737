"""Advantages and the loss of a vector of tokens, against the plain reference."""

from __future__ import annotations

import random

import numpy as np
import pytest
import reference
import torch

from srl_rlvr.policies.advantages import AdvantageKind, group_advantages
from srl_rlvr.policies.losses import UpdateSpec, cross_entropy_loss, policy_gradient_loss

KINDS: list[AdvantageKind] = ["grpo", "dr_grpo", "rloo"]
GROUPS = [[1.0, 0.0], [0.2, 0.9, -1.0, 0.4, 0.4], [1.0] + [0.0] * 63, [0.5, 0.5001, 0.4999]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rewards", GROUPS, ids=len)
def test_advantages_are_those_of_the_formula(kind: AdvantageKind, rewards: list[float]) -> None:
    np.testing.assert_allclose(
        group_advantages(np.array(rewards), kind), reference.advantages(rewards, kind), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_stand_in_the_order_of_their_rewards_and_sum_to_zero(kind: AdvantageKind) -> None:
    rewards = np.array([0.1, 0.7, 0.3, 0.9])
    found = group_advantages(rewards, kind)
    assert np.argsort(found).tolist() == np.argsort(rewards).tolist()
    assert found.sum() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_group_has_no_advantage(kind: AdvantageKind) -> None:
    assert group_advantages(np.full(8, 0.3), kind).tolist() == pytest.approx([0.0] * 8, abs=1e-6)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3)])
def test_less_than_a_group_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a group needs at least 2 rewards"):
        group_advantages(np.zeros(shape), "grpo")


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_loss_of_every_token_is_that_of_the_formula(kl: float) -> None:
    """Ratios below, within and above the clip range, weights below and above the cap, both signs of advantage."""
    spec = UpdateSpec("policy_gradient", 1e-5, clip_low=0.2, clip_high=0.28, importance_cap=2.0, kl=kl)
    rng = random.Random(0)
    total = torch.zeros((), dtype=torch.float64)
    rows = []
    for _ in range(400):
        new, old = -3 + rng.gauss(0, 0.4), -3 + rng.gauss(0, 0.2)
        rows.append((new, old, -3 + rng.gauss(0, 0.8), rng.choice([-1.3, 0.0, 0.8]), -3 + rng.gauss(0, 0.5)))
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    ours, theirs = columns[0].clone().requires_grad_(), columns[0].clone().requires_grad_()
    for t, (_, old, behavior, advantage, fixed) in enumerate(rows):
        total = total + reference.token_loss(theirs[t], old, behavior, advantage, fixed if kl else None, spec)
    result = policy_gradient_loss(ours, columns[1], columns[2], columns[3], columns[4] if kl else None, spec)
    total.backward()
    result.loss.backward()
    assert ours.grad is not None and theirs.grad is not None
    assert float(result.loss.detach()) == pytest.approx(float(total.detach()), rel=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert 20 < int(result.clipped) < 380
    assert (float(result.kl) > 0) == (kl > 0)


def test_a_clipped_token_has_no_gradient_and_is_counted() -> None:
    spec = UpdateSpec("policy_gradient", 1e-5, clip_low=0.2, clip_high=0.28)
    old = torch.zeros(4)
    new = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5])).requires_grad_()
    result = policy_gradient_loss(new, old, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), None, spec)
    result.loss.backward()
    assert new.grad is not None
    assert (new.grad == 0).tolist() == [True, False, False, True] and int(result.clipped) == 2


@pytest.mark.parametrize(("kl", "advantage"), [(0.3, 0.0), (0.0, -1.0), (0.3, 1.0)])
def test_a_ratio_beyond_float32_keeps_loss_and_gradient_finite(kl: float, advantage: float) -> None:
    spec = UpdateSpec("policy_gradient", 1e-5, kl=kl)
    new = torch.tensor([-120.0, -0.5, -120.0], requires_grad=True)
    old = torch.tensor([-120.0, -140.0, -140.0])
    fixed = torch.tensor([-0.5, -0.5, -1.0]) if kl else None
    result = policy_gradient_loss(new, old, old, torch.full((3,), advantage), fixed, spec)
    result.loss.backward()
    assert new.grad is not None
    assert torch.isfinite(result.loss) and torch.isfinite(new.grad).all()
    if kl:  # a token that the reference finds likelier is pulled up
        assert new.grad[0] < -1e6
    elif advantage < 0:  # a bad token that became likelier is pushed down
        assert new.grad[1] > 1e6


def test_cross_entropy_is_the_negative_sum_of_logprobs() -> None:
    assert float(cross_entropy_loss(torch.tensor([-0.5, -1.5])).loss) == 2.0
