"""Attention over a forest of prefix trees, and which models can take it.

`tree_attention` is registered with transformers as an attention implementation and reads the `TreePass` that travels
with the forward call, so any decoder that takes a registered attention function works unchanged. Below it there are
two ways to the same values: flash kernels on a CPU, FlexAttention on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from srl_rlvr.errors import InputError
from srl_rlvr.policies.prefix_tree import Branch, Forest, Layout, Span, Tree, plant, plant_one_by_one

ATTENTION_NAME = "srl_rlvr_prefix_tree"
# Relative difference of hidden states that rounding explains; a token that sees too much or too little makes more.
_ROUNDING = 1e-3


class UnsupportedAttention(Exception):
    """The model asks for something that `tree_attention` does not compute."""


class TrunkMemory:
    """Keys and values of a forest's trunks, layer by layer.

    The trunks' pass without gradient writes them; the passes of the branches read them and leave their gradients.
    The trunks' pass with gradient comes last: backward through the trunks starts from what it writes, and the memory
    lets go of its own copy.
    """

    def __init__(self) -> None:
        self._leaves: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._written: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []

    def write(self, layer: torch.nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        if not torch.is_grad_enabled():
            self._leaves[layer] = (key.detach().requires_grad_(), value.detach().requires_grad_())
            return
        leaves = self._leaves.pop(layer, ())  # nothing is left where activation checkpointing comes by again
        for written, leaf in zip((key, value), leaves, strict=False):
            if leaf.grad is not None and written.requires_grad:
                self._written.append(written)
                self._gradients.append(leaf.grad)

    def read(self, layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        return self._leaves[layer]

    def written(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values of the pass with gradient, and the gradients that the branches left for them."""
        return self._written, self._gradients


@dataclass(frozen=True)
class TreePass:
    """What travels with the forward call of one pack; the pack of trunks `writes` the memory."""

    layout: Layout
    memory: TrunkMemory
    writes: bool


def check_options(options: dict[str, Any]) -> None:
    """Raises UnsupportedAttention where what a model passes to its attention function would change the values."""
    for option in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if options.get(option) is not None:
            raise UnsupportedAttention(f"its attention has a '{option}'")


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, N, D]
    key: torch.Tensor,  # [1, Hkv, N, D]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    tree_pass: TreePass | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one pack; without a `tree_pass`, plain causal attention. Returns [1, N, H, D].

    Raises UnsupportedAttention where an option would change the values.
    """
    check_options(options)
    if query.shape[-1] != value.shape[-1]:
        raise UnsupportedAttention("its keys and values differ in size")
    if tree_pass is None:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None
    if tree_pass.writes:
        tree_pass.memory.write(module, key, value)
        trunk_key, trunk_value = key[:, :, :0], value[:, :, :0]
    else:
        trunk_key, trunk_value = tree_pass.memory.read(module)
    attend = _flex_tree if query.is_cuda else _FlashTree.apply
    return attend(query, key, value, trunk_key, trunk_value, tree_pass.layout, scaling).transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, tree_attention)


def _flex_tree(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trunk_key: torch.Tensor,
    trunk_value: torch.Tensor,
    layout: Layout,
    scale: float | None,
) -> torch.Tensor:
    attend = _compiled_flex() if query.is_cuda else flex_attention
    keys, values = torch.cat([trunk_key, key], dim=2), torch.cat([trunk_value, value], dim=2)
    mask = _block_mask(layout, trunk_key.shape[2], query.device)
    return attend(query, keys, values, block_mask=mask, scale=scale, enable_gqa=True)  # type: ignore[return-value]


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=1)  # the same for every layer of a pass
def _block_mask(layout: Layout, trunk_tokens: int, device: torch.device) -> BlockMask:
    """Keys are the trunks' tokens and then the pack's own."""
    own, first, last = (np.zeros(layout.tokens, dtype=np.int64) for _ in range(3))
    for number, span in enumerate(layout.spans):
        own[span.start : span.stop] = number
    for queries, shared in layout.looks:
        first[queries.start : queries.stop] = shared.start
        last[queries.start : queries.stop] = shared.stop
    own_N, first_N, last_N = (torch.from_numpy(x).to(device) for x in (own, first, last))

    def sees(batch: Any, head: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        in_trunk = (first_N[q] <= kv) & (kv < last_N[q])
        here = (kv - trunk_tokens).clamp(min=0)
        return in_trunk | ((kv >= trunk_tokens) & (own_N[q] == own_N[here]) & (here <= q))

    return create_block_mask(sees, None, None, layout.tokens, trunk_tokens + layout.tokens, device=device)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _FlashTree(torch.autograd.Function):
    """Tree attention from torch's flash kernels for CPUs, on views: no keys copied, no masks.

    A branch's output is that over itself and that over its trunk, weighted by their log-sum-exps. Backward, a part's
    kernel that is given the *merged* output and log-sum-exp gives that part's share of the gradient, exactly
    (Liu et al. 2023, *Ring Attention*, 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        trunk_key: torch.Tensor,
        trunk_value: torch.Tensor,
        layout: Layout,
        scale: float | None,
    ) -> torch.Tensor:
        output = _like_rows(query)
        logsumexp = query.new_empty(query.shape[:3])  # [1, H, N]
        for span in layout.spans:
            q, k, v, out = (_rows(x, span) for x in (query, key, value, output))
            part, logsumexp[:, :, span.start : span.stop] = _flash(q, k, v, is_causal=True, scale=scale)
            out.copy_(part)
        for queries, shared in layout.looks:
            k, v = _rows(trunk_key, shared), _rows(trunk_value, shared)
            part, part_logsumexp = _flash(_rows(query, queries), k, v, scale=scale)
            merged = logsumexp[:, :, queries.start : queries.stop]
            _rows(output, queries).lerp_(part, torch.sigmoid(part_logsumexp - merged)[..., None])
            torch.logaddexp(merged, part_logsumexp, out=merged)
        ctx.save_for_backward(query, key, value, trunk_key, trunk_value, output, logsumexp)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, trunk_key, trunk_value, output, logsumexp = ctx.saved_tensors
        d_query, d_key, d_value = (_like_rows(x) for x in (query, key, value))
        d_trunk_key, d_trunk_value = torch.zeros_like(trunk_key), torch.zeros_like(trunk_value)

        def part(queries: Span, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, ...]:
            upstream, q, out = (_rows(x, queries) for x in (grads[0], query, output))
            merged = logsumexp[:, :, queries.start : queries.stop]
            return _flash_backward(upstream, q, k, v, out, merged, 0.0, causal, scale=ctx.scale)

        for span in ctx.layout.spans:
            found = part(span, _rows(key, span), _rows(value, span), True)
            for whole, share in zip((d_query, d_key, d_value), found, strict=True):
                _rows(whole, span).copy_(share)
        for queries, shared in ctx.layout.looks:
            found = part(queries, _rows(trunk_key, shared), _rows(trunk_value, shared), False)
            _rows(d_query, queries).add_(found[0])
            _rows(d_trunk_key, shared).add_(found[1])
            _rows(d_trunk_value, shared).add_(found[2])
        return d_query, d_key, d_value, d_trunk_key, d_trunk_value, None, None


def _rows(x: torch.Tensor, span: Span) -> torch.Tensor:
    return x[:, :, span.start : span.stop]


def _like_rows(x: torch.Tensor) -> torch.Tensor:
    """Empty, [1, H, N, D] as `x`, but token by token in memory, as the layers around attention have it."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def adopt_tree_attention(network: Any) -> str | None:
    """Switches `network` (a causal language model of transformers) to tree attention, and returns None.

    Where that would change what it computes, it keeps its own attention, and the reason is returned: it is then to be
    given whole sequences. Decided by its config and by its hidden states on a tiny tree.
    Raises InputError where not even sequences packed into one row are kept apart (recurrent layers).
    """
    trees = _tiny_trees(network.config.get_text_config().vocab_size)
    alone = {branch.row: _states_alone(network, tree, branch) for tree in trees for branch in tree.branches}
    decoder = network.get_decoder()  # a vision tower keeps its own
    own = decoder.config._attn_implementation
    obstacle = obstacle_to_trees(network)
    if obstacle is None:
        decoder.set_attn_implementation(ATTENTION_NAME)
        try:
            (forest,) = plant(trees, token_budget=1000, device=network.device)
            if not _agrees(network, forest, alone, as_tree=True):
                obstacle = "its hidden states on a tree are not those of the samples alone"
        except UnsupportedAttention as unsupported:
            obstacle = str(unsupported)
    if obstacle is not None:
        decoder.set_attn_implementation(own)
        (forest,) = plant_one_by_one(trees, token_budget=1000, device=network.device)
        if not _agrees(network, forest, alone, as_tree=False):
            model_type = network.config.model_type
            raise InputError(f"model type '{model_type}' mixes up sequences in one row; it cannot be trained here yet")
    return obstacle


def obstacle_to_trees(network: Any) -> str | None:
    """What the config says that a tiny tree would not show, as its sequences are shorter than any window."""
    config = network.config.get_text_config()
    if not network.get_decoder()._supports_attention_backend:
        return "it takes no registered attention function"
    kinds = getattr(config, "layer_types", None)
    unusual = sorted(set(kinds or []) - {"full_attention"})
    if unusual:
        return f"it has layers of {', '.join(unusual)}"
    if kinds is None and getattr(config, "sliding_window", None) is not None:
        return "it has sliding-window attention"
    return None


def _tiny_trees(vocabulary: int) -> list[Tree]:
    def ids(start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count) * 7 % vocabulary

    branches = (Branch(3, ids(20, 3), 0), Branch(6, ids(30, 4), 1), Branch(6, ids(40, 2), 2))
    return [Tree(ids(1, 6), branches), Tree(ids(10, 4), (Branch(4, ids(50, 5), 3),))]


@torch.no_grad()
def _states_alone(network: Any, tree: Tree, branch: Branch) -> torch.Tensor:
    """Hidden states [completion, hidden] that predict the completion, from a plain forward pass of the sample."""
    ids = torch.from_numpy(np.concatenate([tree.trunk[: branch.offset], branch.completion[:-1]])).to(network.device)
    return network.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0, branch.offset - 1 :]


@torch.no_grad()
def _agrees(network: Any, forest: Forest, alone: dict[int, torch.Tensor], as_tree: bool) -> bool:
    memory = TrunkMemory()
    for pack in forest.packs:
        options = {"tree_pass": TreePass(pack.layout, memory, pack is forest.trunks)} if as_tree else {}
        states = network.get_decoder()(
            input_ids=pack.token_ids[None], position_ids=pack.position_ids[None], use_cache=False, **options
        ).last_hidden_state[0, pack.predictors]
        where = zip(pack.token_rows.tolist(), pack.token_indices.tolist(), strict=True)
        expected = torch.stack([alone[row][index] for row, index in where])
        if float((states - expected).norm()) > _ROUNDING * float(expected.norm()):
            return False
    return True
