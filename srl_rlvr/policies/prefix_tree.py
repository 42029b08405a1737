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
class BranchGroup:
    """Branches of one tree with one offset, padded to one length L: queries [B, L] as positions in the pack."""

    trunk_start: int
    offset: int
    positions_BL: torch.Tensor
    mask_LK: torch.Tensor  # True where a query may look: the trunk part whole, the own part causal


@dataclass(frozen=True)
class Layout:
    """What `tree_attention` needs: trunk spans, branch groups, and where each pack position's output lies."""

    trunks: tuple[tuple[int, int], ...]
    groups: tuple[BranchGroup, ...]
    output_order: torch.Tensor


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
    trunks: list[tuple[int, int]] = []
    placed: list[tuple[int, int, list[tuple[int, int]]]] = []  # trunk start, offset, [(start, length)]
    cursor = 0
    for tree in trees:
        trunk_start = cursor
        trunks.append((trunk_start, len(tree.trunk)))
        token_ids.append(tree.trunk)
        position_ids.append(np.arange(len(tree.trunk)))
        cursor += len(tree.trunk)
        by_offset: dict[int, list[tuple[int, int]]] = {}
        for branch in tree.branches:
            length = branch.input_length
            token_ids.append(branch.completion[:-1])
            position_ids.append(np.arange(branch.offset, branch.offset + length))
            predictors.append(np.concatenate([[trunk_start + branch.offset - 1], np.arange(cursor, cursor + length)]))
            targets.append(branch.completion)
            rows.append(np.full(length + 1, branch.row))
            indices.append(np.arange(length + 1))
            if length:
                by_offset.setdefault(branch.offset, []).append((cursor, length))
            cursor += length
        placed += [(trunk_start, offset, spans) for offset, spans in by_offset.items()]

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    return Pack(
        tensor(token_ids),
        tensor(position_ids),
        _layout(trunks, placed, cursor, device),
        tensor(predictors),
        tensor(targets),
        tensor(rows),
        tensor(indices),
    )


def _layout(
    trunks: list[tuple[int, int]],
    placed: list[tuple[int, int, list[tuple[int, int]]]],
    tokens: int,
    device: torch.device | str,
) -> Layout:
    """Attention is computed trunk by trunk, then group by group; `output_order` undoes that order and the padding."""
    order = np.empty(tokens, dtype=np.int64)
    written = 0
    for start, length in trunks:
        order[start : start + length] = np.arange(written, written + length)
        written += length
    groups = []
    for trunk_start, offset, spans in placed:
        longest = max(length for _, length in spans)
        positions = np.empty((len(spans), longest), dtype=np.int64)
        for b, (start, length) in enumerate(spans):
            # Padding repeats the first token: its output is dropped, and the causal mask hides it as a key.
            positions[b] = start
            positions[b, :length] = np.arange(start, start + length)
            order[start : start + length] = np.arange(written, written + length)
            written += longest
        mask = torch.ones(longest, offset + longest, dtype=torch.bool, device=device).tril(diagonal=offset)
        groups.append(BranchGroup(trunk_start, offset, torch.from_numpy(positions).to(device), mask))
    return Layout(tuple(trunks), tuple(groups), torch.from_numpy(order).to(device))


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
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads:
        key = key.repeat_interleave(heads // key_heads, dim=1)
        value = value.repeat_interleave(heads // key_heads, dim=1)
    if tree_layout is None:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout, scale=scaling)
        return output.transpose(1, 2), None
    q, k, v = query[0], key[0], value[0]  # [H, N, D]
    parts = []
    for start, length in tree_layout.trunks:
        span = slice(start, start + length)
        trunk = F.scaled_dot_product_attention(
            q[None, :, span], k[None, :, span], v[None, :, span], is_causal=True, dropout_p=dropout, scale=scaling
        )
        parts.append(trunk[0])
    for group in tree_layout.groups:
        branches, longest = group.positions_BL.shape
        flat = group.positions_BL.reshape(-1)
        trunk = slice(group.trunk_start, group.trunk_start + group.offset)

        def own(x: torch.Tensor, flat: torch.Tensor = flat, b: int = branches, t: int = longest) -> torch.Tensor:
            return x.index_select(1, flat).unflatten(1, (b, t)).transpose(0, 1)  # [B, H, L, D]

        def with_trunk(x: torch.Tensor, trunk: slice = trunk, b: int = branches) -> torch.Tensor:
            return torch.cat([x[:, trunk].expand(b, -1, -1, -1), own(x)], dim=2)

        output = F.scaled_dot_product_attention(
            own(q), with_trunk(k), with_trunk(v), attn_mask=group.mask_LK, dropout_p=dropout, scale=scaling
        )
        parts.append(output.transpose(0, 1).flatten(1, 2))
    return torch.cat(parts, dim=1).index_select(1, tree_layout.output_order).transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION_NAME, tree_attention)
