"""Attention over a pack of prefix trees, and which models can take it.

`tree_attention` is registered with transformers as an attention implementation and reads the layout that travels
with the forward call, so any decoder that takes a registered attention function works unchanged. Below it there are
two ways to the same values: flash kernels on a CPU, FlexAttention on a GPU.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from srl_rlvr.errors import InputError
from srl_rlvr.policies.prefix_tree import Branch, Layout, Span, Tree, lay_out, one_by_one

ATTENTION_NAME = "srl_rlvr_prefix_tree"
# Relative difference of hidden states that rounding explains; a token that sees too much or too little makes more.
_ROUNDING = 1e-3


class UnsupportedAttention(Exception):
    """The model asks for something that `tree_attention` does not compute."""


def adopt_tree_attention(network: Any) -> str | None:
    """Switches `network` (a causal language model of transformers) to tree attention, and returns None.

    Where that would change what it computes, it keeps its own attention, and the reason is returned: it is then to be
    given packed sequences. Decided by its config and by its hidden states on a tiny tree.
    Raises InputError where not even packed sequences are kept apart (recurrent layers).
    """
    trees = _tiny_trees(network.config.vocab_size)
    alone = torch.cat([_sequence_states(network, tree.trunk, tree.branches[0]) for tree in one_by_one(trees)])
    own = network.config._attn_implementation
    obstacle = _obstacle(network)
    if obstacle is None:
        network.set_attn_implementation(ATTENTION_NAME)
        try:
            agrees = _agree(_pack_states(network, trees, shared=True), alone)
            obstacle = None if agrees else "its hidden states on a tree are not those of the samples alone"
        except UnsupportedAttention as unsupported:
            obstacle = str(unsupported)
    if obstacle is not None:
        network.set_attn_implementation(own)
        if not _agree(_pack_states(network, one_by_one(trees), shared=False), alone):
            model_type = network.config.model_type
            raise InputError(f"model type '{model_type}' mixes up sequences in one row; it cannot be trained here yet")
    return obstacle


def _obstacle(network: Any) -> str | None:
    """What the config says that a tiny tree would not show, as its sequences are shorter than any window."""
    config = network.config.get_text_config()
    if not network.get_decoder()._supports_attention_backend:
        return "it takes no registered attention function"
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None:
        return "it has sliding-window attention"
    return None


def _tiny_trees(vocabulary: int) -> list[Tree]:
    def ids(start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count) * 7 % vocabulary

    branches = (Branch(3, ids(20, 3), 0), Branch(6, ids(30, 4), 1), Branch(6, ids(40, 2), 2))
    return [Tree(ids(1, 6), branches), Tree(ids(10, 4), (Branch(4, ids(50, 5), 3),))]


@torch.no_grad()
def _sequence_states(network: Any, prompt: np.ndarray, branch: Branch) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([prompt, branch.completion[:-1]])).to(network.device)
    return network.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0, branch.offset - 1 :]


@torch.no_grad()
def _pack_states(network: Any, trees: list[Tree], shared: bool) -> torch.Tensor:
    pack = lay_out(trees, network.device)
    layout = {"tree_layout": pack.layout} if shared else {}
    states = network.get_decoder()(
        input_ids=pack.token_ids[None], position_ids=pack.position_ids[None], use_cache=False, **layout
    )
    return states.last_hidden_state[0].index_select(0, pack.predictors)


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).float().norm() <= _ROUNDING * expected.float().norm())


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, N, D]
    key: torch.Tensor,  # [1, Hkv, N, D]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    tree_layout: Layout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a pack; without a layout, plain causal attention. Returns [1, N, H, D].

    Raises UnsupportedAttention where an option would change the values.
    """
    for option in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if options.get(option) is not None:
            raise UnsupportedAttention(f"its attention has a '{option}'")
    if query.shape[-1] != value.shape[-1]:
        raise UnsupportedAttention("its keys and values differ in size")
    if tree_layout is None:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    elif query.is_cuda:
        mask = _block_mask(tree_layout, query.device)
        output = _compiled_flex()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    else:
        output = _FlashTree.apply(query, key, value, tree_layout, scaling)
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, tree_attention)


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=1)  # the same for every layer of a pass
def _block_mask(layout: Layout, device: torch.device) -> BlockMask:
    """A token sees the tokens of its own span up to itself, and the part of the trunk that its span shares."""
    own, first, last = (np.zeros(layout.tokens, dtype=np.int64) for _ in range(3))
    for number, span in enumerate(_spans(layout)):
        own[span.start : span.stop] = number
    for group in layout.groups:
        first[group.span.start : group.span.stop] = group.shared.start
        last[group.span.start : group.span.stop] = group.shared.stop
    own_N, first_N, last_N = (torch.from_numpy(x).to(device) for x in (own, first, last))

    def sees(batch: Any, head: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return ((own_N[q] == own_N[kv]) & (kv <= q)) | ((first_N[q] <= kv) & (kv < last_N[q]))

    return create_block_mask(sees, None, None, layout.tokens, layout.tokens, device=device)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _FlashTree(torch.autograd.Function):
    """Tree attention from torch's flash kernels for CPUs, on views of the pack: no keys copied, no masks.

    A branch's output is that over its trunk and that over itself, weighted by their log-sum-exps. Backward, a part's
    kernel that is given the *merged* output and log-sum-exp gives that part's share of the gradient, exactly
    (Liu et al. 2023, *Ring Attention*, 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float | None
    ) -> torch.Tensor:
        output = _like_rows(query)
        logsumexp = query.new_empty(query.shape[:3])  # [1, H, N]
        for queries, keys, causal in _parts(layout):
            part, part_logsumexp = _flash(_rows(query, queries), _rows(key, keys), _rows(value, keys),
                                          is_causal=causal, scale=scale)  # fmt: skip
            here, here_logsumexp = _rows(output, queries), logsumexp[:, :, queries.start : queries.stop]
            if causal:
                here.copy_(part)
                here_logsumexp.copy_(part_logsumexp)
            else:
                here.lerp_(part, torch.sigmoid(part_logsumexp - here_logsumexp)[..., None])
                torch.logaddexp(here_logsumexp, part_logsumexp, out=here_logsumexp)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        found = [_like_rows(x).zero_() for x in (query, key, value)]
        for queries, keys, causal in _parts(ctx.layout):
            parts = _flash_backward(
                _rows(grads[0], queries),
                _rows(query, queries),
                _rows(key, keys),
                _rows(value, keys),
                _rows(output, queries),
                logsumexp[:, :, queries.start : queries.stop],
                0.0,
                causal,
                scale=ctx.scale,
            )
            for whole, rows, part in zip(found, (queries, keys, keys), parts, strict=True):
                _rows(whole, rows).add_(part)
        return (*found, None, None)


def _parts(layout: Layout) -> Iterator[tuple[Span, Span, bool]]:
    """(queries, keys, causal): each span of tokens on itself, then each group of branches on what it shares."""
    for span in _spans(layout):
        yield span, span, True
    for group in layout.groups:
        yield group.span, group.shared, False


def _spans(layout: Layout) -> Iterator[Span]:
    """Trunks and branches."""
    return itertools.chain(layout.trunks, *(group.branches for group in layout.groups))


def _rows(x: torch.Tensor, span: Span) -> torch.Tensor:
    return x[:, :, span.start : span.stop]


def _like_rows(x: torch.Tensor) -> torch.Tensor:
    """Empty, [1, H, N, D] as `x`, but token by token in memory, as the layers around attention have it."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
