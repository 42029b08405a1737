"""Samples that share prefixes, computed once: one trunk of tokens, every sample a branch off it.

Exact, not approximate: a branch attends to the trunk up to its own offset and to itself, with positions
that continue from there, so its log-probabilities and gradients are those of the sample run alone
(*Tree Training*, 2511.00413; *Prefix Grouper*, 2506.05433).

    trunk      x x x x x s s s s s s s          token ids of the longest prompt
    branch 1           └ a a a                   offset 5
    branch 2                   └ a a a a         offset 9

A `Pack` is the tokens of one pass through the model, in one row. A `Forest` is several trees: a pack of their trunks,
then packs of their branches, each as large as the token budget allows. How tokens see one another across these packs
is the matter of `attention.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch

T = TypeVar("T")


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
    images: tuple[bytes, ...] = ()  # that the trunk's tokens have places for, in order
    positions: np.ndarray | None = None  # [axes, trunk] where the model does not just count them

    @property
    def shift(self) -> int:
        """What is to be added to the count of a token that follows the images."""
        return 0 if self.positions is None else int(self.positions[0, -1]) - len(self.trunk) + 1


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` (exclusive) of a pack."""

    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """What attention needs to know of a pack. Each span sees itself, causally; together they cover the pack.

    In packs of branches, `looks` are (tokens of this pack, tokens of the trunks' pack that each of them sees).
    """

    spans: tuple[Span, ...]
    looks: tuple[tuple[Span, Span], ...]

    @property
    def tokens(self) -> int:
        return self.spans[-1].stop


@dataclass(frozen=True)
class Pack:
    """One forward pass. `predictors[c]` is the token of the pack whose hidden state predicts completion token c."""

    token_ids: torch.Tensor  # [N]
    position_ids: torch.Tensor  # [N], or [axes, N]
    layout: Layout
    predictors: torch.Tensor  # [T]
    targets: torch.Tensor  # [T]
    token_rows: torch.Tensor  # [T] row of the sample table that each completion token belongs to
    token_indices: torch.Tensor  # [T] its index within that sample's completion
    images: tuple[bytes, ...] = ()  # of its prompts, in the order of their places
    prompt_mask: torch.Tensor | None = None  # [N] where images may stand: tokens of prompts that have some


@dataclass(frozen=True)
class Forest:
    """Trees that are computed together. The trunks' own pack predicts the first token of every completion."""

    trunks: Pack
    branches: tuple[Pack, ...]

    @property
    def packs(self) -> tuple[Pack, ...]:
        return (self.trunks, *self.branches)


def build_trees(samples: pa.Table) -> list[Tree]:
    """One tree for each trunk id, in order of first appearance.

    Raises ValueError where prompts of one trunk are not prefixes of one another: that would train on tokens
    that were never sampled.
    """
    trunk_ids = samples["trunk_id"].to_pylist()
    images = samples["images"].to_pylist()
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
        branches = tuple(Branch(len(prompts[row]), completions[row], row) for row in rows)
        trees.append(Tree(trunk, branches, tuple(images[rows[0]])))
    return trees


def plant(trees: Sequence[Tree], token_budget: int, device: torch.device | str = "cpu") -> Iterator[Forest]:
    """Trees in order, as many at once as their trunks fit the budget; a pack is larger only for one longer sequence.

    A tree of one branch is a sequence like any other, in the pack of the trunks: no memory to write and read.
    """
    for group in _within_budget(trees, _trunk_length, token_budget):
        row, branches = _Row(), []
        for tree in group:
            if len(tree.branches) == 1:
                row.add_whole(tree)
                continue
            span = row.add(tree.trunk, np.arange(len(tree.trunk)) if tree.positions is None else tree.positions)
            row.show(tree.images, span.start, len(tree.trunk))
            for branch in sorted(tree.branches, key=lambda branch: branch.offset):
                row.predict(branch, slice(0, 1), span.start + branch.offset - 1)
                if branch.input_length:
                    branches.append((span.start, tree.shift, branch))
        packs = _within_budget(branches, lambda placed: placed[2].input_length, token_budget)
        yield Forest(row.pack(device), tuple(_branch_pack(pack, device) for pack in packs))


def plant_one_by_one(trees: Sequence[Tree], token_budget: int, device: torch.device | str = "cpu") -> Iterator[Forest]:
    """Every sample a whole sequence that shares nothing: packs for models that cannot attend to trees."""
    alone = (replace(tree, branches=(branch,)) for tree in trees for branch in tree.branches)
    for group in _within_budget(alone, _trunk_length, token_budget):
        row = _Row()
        for tree in group:
            row.add_whole(tree)
        yield Forest(row.pack(device), ())


def _trunk_length(tree: Tree) -> int:
    """Tokens in the pack of trunks."""
    first = tree.branches[0]
    return first.offset + first.input_length if len(tree.branches) == 1 else len(tree.trunk)


def _branch_pack(placed: Sequence[tuple[int, int, Branch]], device: torch.device | str) -> Pack:
    """The pack of branches, each with the start of its trunk in the trunks' pack and the shift of its positions."""
    row = _Row()
    for (start, offset), side_by_side in itertools.groupby(placed, lambda each: (each[0], each[2].offset)):
        spans = []
        for _, shift, branch in side_by_side:
            span = row.add(branch.completion[:-1], offset + shift + np.arange(branch.input_length))
            row.predict(branch, slice(1, len(branch.completion)), span.start)
            spans.append(span)
        row.looks.append((Span(spans[0].start, spans[-1].stop), Span(start, start + offset)))
    return row.pack(device)


def _within_budget(items: Iterable[T], size: Callable[[T], int], budget: int) -> Iterator[list[T]]:
    """Items in order, in lists whose sizes sum up to at most `budget`; a larger item is alone."""
    part: list[T] = []
    used = 0
    for item in items:
        if part and used + size(item) > budget:
            yield part
            part, used = [], 0
        part.append(item)
        used += size(item)
    if part:
        yield part


@dataclass
class _Row:
    """A pack in the making."""

    spans: list[Span] = field(default_factory=list)
    looks: list[tuple[Span, Span]] = field(default_factory=list)
    token_ids: list[np.ndarray] = field(default_factory=list)
    position_ids: list[np.ndarray] = field(default_factory=list)
    predictors: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    indices: list[np.ndarray] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    prompts_with_images: list[Span] = field(default_factory=list)

    def add(self, token_ids: np.ndarray, positions: np.ndarray) -> Span:
        start = self.spans[-1].stop if self.spans else 0
        self.spans.append(Span(start, start + len(token_ids)))
        self.token_ids.append(token_ids)
        self.position_ids.append(positions)
        return self.spans[-1]

    def add_whole(self, tree: Tree) -> None:
        """The only sample of a tree as one sequence: its prompt and what it adds to it."""
        branch = tree.branches[0]
        positions = np.arange(branch.offset + branch.input_length)
        if tree.positions is not None:
            after = tree.shift + positions[branch.offset :]
            positions = np.hstack([tree.positions[:, : branch.offset], np.tile(after, (len(tree.positions), 1))])
        span = self.add(np.concatenate([tree.trunk[: branch.offset], branch.completion[:-1]]), positions)
        self.show(tree.images, span.start, branch.offset)
        self.predict(branch, slice(0, len(branch.completion)), span.start + branch.offset - 1)

    def show(self, images: Sequence[bytes], start: int, length: int) -> None:
        """The prompt of `length` tokens at `start` has places for these."""
        if images:
            self.images += images
            self.prompts_with_images.append(Span(start, start + length))

    def predict(self, branch: Branch, which: slice, first: int) -> None:
        """Completion tokens `which` of `branch` are predicted by the tokens of this row from `first` on."""
        targets = branch.completion[which]
        self.targets.append(targets)
        self.predictors.append(np.arange(first, first + len(targets)))
        self.rows.append(np.full(len(targets), branch.row))
        self.indices.append(np.arange(which.start, which.stop))

    def pack(self, device: torch.device | str) -> Pack:
        def tensor(parts: list[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(parts, axis=-1).astype(np.int64)).to(device)

        mask = None
        if self.images:
            mask = torch.zeros(self.spans[-1].stop, dtype=torch.bool)
            for span in self.prompts_with_images:
                mask[span.start : span.stop] = True
            mask = mask.to(device)
        return Pack(
            tensor(self.token_ids),
            tensor(self.position_ids),
            Layout(tuple(self.spans), tuple(self.looks)),
            tensor(self.predictors),
            tensor(self.targets),
            tensor(self.rows),
            tensor(self.indices),
            tuple(self.images),
            mask,
        )
