from __future__ import annotations

import torch

from srl_rlvr.engines.adapters import Adapter


class Fused(torch.nn.Linear):
    """Two projections in one, answering as vLLM's linear layers do: (output, bias)."""

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(input), None


def pairs(rank: int, outs: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(rank, 6), torch.randn(out, rank)) for out in outs]


@torch.no_grad()
def test_each_projection_gets_its_own_adapter_as_if_merged() -> None:
    torch.manual_seed(0)
    layer, x = Fused(6, 7, bias=False), torch.randn(5, 6)
    adapter, (one, two) = Adapter(layer), pairs(2, (3, 4))
    adapter.hold([one, two], 0.5)
    merged = layer.weight + 0.5 * torch.cat([one[1] @ one[0], two[1] @ two[0]])
    torch.testing.assert_close(layer(x)[0], x @ merged.t())


@torch.no_grad()
def test_new_adapters_replace_the_old_ones_and_dropped_ones_leave_the_layer_as_it_was() -> None:
    layer, x = torch.nn.Linear(6, 7), torch.randn(1, 5, 6)  # with a batch dimension, as in transformers
    plain, adapter = layer(x), Adapter(layer)
    assert torch.equal(layer(x), plain)
    for _ in range(2):
        ((down, up),) = pairs(2, (7,))
        adapter.hold([(down, up)], 1.0)
        torch.testing.assert_close(layer(x), plain + x @ down.t() @ up.t())
    adapter.drop()
    assert torch.equal(layer(x), plain)


@torch.no_grad()
def test_what_is_held_is_a_copy() -> None:
    layer, x = torch.nn.Linear(6, 7), torch.randn(5, 6)
    adapter, ((down, up),) = Adapter(layer), pairs(2, (7,))
    adapter.hold([(down, up)], 1.0)
    before = layer(x)
    down.zero_()
    up.zero_()
    assert torch.equal(layer(x), before)
