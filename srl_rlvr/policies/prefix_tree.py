"""Samples that share prefixes, computed once: one trunk of tokens, every sample a branch off it.

Exact, not approximate: a branch attends to the trunk up to its own offset and to itself, with positions
that continue from there, so its log-probabilities and gradients are those of the sample run alone
(*Tree Training*, 2511.00413; *Prefix Grouper*, 2506.05433).

    trunk      x x x x x s s s s s s s          token ids of the longest prompt
    branch 1           └ a a a                   offset 5
    branch 2                   └ a a a a         offset 9

A `Pack` is several trees laid one after the other in one row of tokens. How the model attends to it is the matter
of `attention.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch


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
    """What attention needs to know: the trunks and the groups of branches, which together cover the pack."""

    tokens: int
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


def one_by_one(trees: Sequence[Tree]) -> list[Tree]:
    """Every sample as a tree of its own: a plain sequence, whose positions a pack counts from 0."""
    return [Tree(tree.trunk[: branch.offset], (branch,)) for tree in trees for branch in tree.branches]


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
        Layout(cursor, tuple(trunks), tuple(groups)),
        tensor(predictors),
        tensor(targets),
        tensor(rows),
        tensor(indices),
    )


def _offset(branch: Branch) -> int:
    return branch.offset
