from __future__ import annotations

import pytest
import torch

from srl_rlvr.policies.output_head import head_logprobs


@pytest.mark.parametrize("rows", [0, 1, 128, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_plain_log_softmax(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=bias)
    hidden = torch.randn(rows, 16, requires_grad=True)
    targets, upstream = torch.randint(50, (rows,)), torch.randn(rows)
    inputs = [hidden, *head.parameters()]

    plain = torch.log_softmax(head(hidden) / 0.7, dim=1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad(plain, inputs, upstream)
    found = head_logprobs(head, hidden, targets, 0.7)

    torch.testing.assert_close(found, plain)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    head = torch.nn.Linear(16, 50, bias=False).requires_grad_(False)
    hidden = torch.randn(5, 16, requires_grad=True)
    head_logprobs(head, hidden, torch.arange(5), 1.0).sum().backward()
    assert hidden.grad is not None and head.weight.grad is None


def test_the_logits_of_all_rows_never_exist_at_once() -> None:
    head, hidden = torch.nn.Linear(16, 3000, bias=False), torch.randn(512, 16, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        head_logprobs(head, hidden, torch.zeros(512, dtype=torch.long), 1.0).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert largest < 512 * 3000 * 4
