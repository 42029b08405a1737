"""Samples that share prefixes, computed once: one trunk of tokens, every sample a branch off it.

Exact, not approximate: a branch attends to the trunk up to its own offset and to itself, with positions
that continue from there, so its log-probabilities and gradients are those of the sample run alone
(*Tree Training*, 2511.00413; *Prefix Grouper*, 2506.05433).

    trunk      x x x x x s s s s s s s          token ids of the longest prompt
    branch 1           └ a a a                   offset 5
    branch 2                   └ a a a a         offset 9

A `Pack` is several trees laid one after the other in one row of tokens. `tree_attention` is registered with
transformers as an attention implementation and reads the layout that travels with the forward call, so any
decoder that takes a registered attention function works unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

ATTENTION_NAME = "srl_rlvr_prefix_tree"


@dataclass(frozen=True)
class Branch:
    """One sample of a tree: where it leaves the trunk, its completion, and its row in the sample table."""

    offset: int
    completion: np.ndarray
    row: int

    @property
    def input_length(self) -> int:
        # The last completion token is predicted and never fed in.
        return len(self.completion) - 1


@dataclass(frozen=True)
class Tree:
    trunk: np.ndarray
    branches: tuple[Branch, ...]

    @property
    def tokens(self) -> int:
        return len(self.trunk) + sum(branch.input_length for branch in self.branches)


@dataclass(frozen=True)
class Span:
    """Pack positions `start` to `stop` (exclusive)."""

    start: int
    stop: int


@dataclass(frozen=True)
class BranchGroup:
    """Branches that leave one trunk at one place: `shared` is the trunk up to there, the branches lie side by side."""

    shared: Span
    branches: tuple[Span, ...]

    @property
    def span(self) -> Span:
        return Span(self.branches[0].start, self.branches[-1].stop)


@dataclass(frozen=True)
class Layout:
    """What `tree_attention` needs: the trunks and the groups of branches, which together cover the pack."""

    trunks: tuple[Span, ...]
    groups: tuple[BranchGroup, ...]


@dataclass(frozen=True)
class Pack:
    """One forward pass. `predictors[c]` is the pack position whose hidden state predicts completion token c."""

    token_ids: torch.Tensor  # [N]
    position_ids: torch.Tensor  # [N]
    layout: Layout
    predictors: torch.Tensor  # [T]
    targets: torch.Tensor  # [T]
    token_rows: torch.Tensor  # [T] row of the sample table that each completion token belongs to
    token_indices: torch.Tensor  # [T] its index within that sample's completion


def build_trees(samples: pa.Table) -> list[Tree]:
    """One tree for each trunk id, in order of first appearance.

    Raises ValueError where prompts of one trunk are not prefixes of one another: that would train on tokens
    that were never sampled.
    """
    trunk_ids = samples["trunk_id"].to_pylist()
    prompts = [np.asarray(ids, dtype=np.int64) for ids in samples["prompt_ids"].to_pylist()]
    completions = [np.asarray(ids, dtype=np.int64) for ids in samples["completion_ids"].to_pylist()]
    rows_of: dict[str, list[int]] = {}
    for row, trunk_id in enumerate(trunk_ids):
        rows_of.setdefault(trunk_id, []).append(row)
    trees = []
    for trunk_id, rows in rows_of.items():
        trunk = max((prompts[row] for row in rows), key=len)
        for row in rows:
            if len(prompts[row]) == 0 or len(completions[row]) == 0:
                raise ValueError(f"sample {row} of trunk {trunk_id}: prompt and completion must not be empty")
            if not np.array_equal(prompts[row], trunk[: len(prompts[row])]):
                raise ValueError(f"sample {row}: its prompt is not a prefix of trunk {trunk_id}")
        trees.append(Tree(trunk, tuple(Branch(len(prompts[row]), completions[row], row) for row in rows)))
    return trees


def pack_trees(trees: Sequence[Tree], token_budget: int) -> Iterator[list[Tree]]:
    """Trees in order, grouped so that a pack holds at most `token_budget` tokens.

    A tree that is larger than the budget is split by branches, each part with its own copy of the trunk.
    """
    pack: list[Tree] = []
    used = 0
    for tree in itertools.chain.from_iterable(_split(tree, token_budget) for tree in trees):
        if pack and used + tree.tokens > token_budget:
            yield pack
            pack, used = [], 0
        pack.append(tree)
        used += tree.tokens
    if pack:
        yield pack


def _split(tree: Tree, token_budget: int) -> Iterator[Tree]:
    branches: list[Branch] = []
    used = len(tree.trunk)
    for branch in tree.branches:
        if branches and used + branch.input_length > token_budget:
            yield _part(tree, branches)
            branches, used = [], len(tree.trunk)
        branches.append(branch)
        used += branch.input_length
    yield _part(tree, branches)


def _part(tree: Tree, branches: list[Branch]) -> Tree:
    return Tree(tree.trunk[: max(branch.offset for branch in branches)], tuple(branches))


def lay_out(trees: Sequence[Tree], device: torch.device | str = "cpu") -> Pack:
    """The pack of `trees`: every trunk, then its branches by offset."""
    token_ids: list[np.ndarray] = []
    position_ids: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    indices: list[np.ndarray] = []
    trunks: list[Span] = []
    groups: list[BranchGroup] = []
    cursor = 0
    for tree in trees:
        trunk = Span(cursor, cursor + len(tree.trunk))
        trunks.append(trunk)
        token_ids.append(tree.trunk)
        position_ids.append(np.arange(len(tree.trunk)))
        cursor = trunk.stop
        for offset, branches in itertools.groupby(sorted(tree.branches, key=_offset), key=_offset):
            spans = []
            for branch in branches:
                length = branch.input_length
                token_ids.append(branch.completion[:-1])
                position_ids.append(np.arange(offset, offset + length))
                predictors.append(np.concatenate([[trunk.start + offset - 1], np.arange(cursor, cursor + length)]))
                targets.append(branch.completion)
                rows.append(np.full(length + 1, branch.row))
                indices.append(np.arange(length + 1))
                if length:
                    spans.append(Span(cursor, cursor + length))
                cursor += length
            if spans:
                groups.append(BranchGroup(Span(trunk.start, trunk.start + offset), tuple(spans)))

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    return Pack(
        tensor(token_ids),
        tensor(position_ids),
        Layout(tuple(trunks), tuple(groups)),
        tensor(predictors),
        tensor(targets),
        tensor(rows),
        tensor(indices),
    )


def _offset(branch: Branch) -> int:
    return branch.offset


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, N, D]
    key: torch.Tensor,  # [1, Hkv, N, D]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Attention over a pack; without a layout, plain causal attention. Returns [1, N, H, D]."""
    if sliding_window is not None or softcap is not None:
        raise ValueError("models with sliding-window or soft-capped attention cannot be trained as prefix trees")
    if tree_layout is None:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    else:
        output = _FlashTree.apply(query, key, value, tree_layout, scaling)
    return output.transpose(1, 2), None


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
    for span in itertools.chain(layout.trunks, *(group.branches for group in layout.groups)):
        yield span, span, True
    for group in layout.groups:
        yield group.span, group.shared, False


def _rows(x: torch.Tensor, span: Span) -> torch.Tensor:
    return x[:, :, span.start : span.stop]


def _like_rows(x: torch.Tensor) -> torch.Tensor:
    """Empty, [1, H, N, D] as `x`, but token by token in memory, as the layers around attention have it."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


AttentionInterface.register(ATTENTION_NAME, tree_attention)
