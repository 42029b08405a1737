"""Keys and values of sequences that branch off shared trunks: the prefix tree, as sampling sees it.

    trunk slot 0    x x x x x s s s s        one prompt, or all step prompts of one problem; computed once
    row 0                   └ a a            a sample: the trunk up to its own offset, then itself
    row 1                   └ a
    row 2                           └ a a a

Trunks and rows lie in static tensors. Rows stay packed at the front: one that ends is replaced by the last one, so a
decoding step computes living rows only, on views. What a query finds in its trunk and in its own row is merged by
log-sum-exp (as in cascade inference), so that a trunk is read once for all of its rows.

It is registered with transformers as an attention implementation; the forward call carries a `Prefill` or a `Decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from srl_rlvr.policies.attention import check_options

ATTENTION_NAME = "srl_rlvr_branch_cache"


class BranchCache:
    """Room for `rows` samples of `row_length` tokens and `trunks` prompts of `trunk_length`, in every layer."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, rows: int, row_length: int, trunks: int, trunk_length: int,
        like: torch.Tensor,
    ):  # fmt: skip
        # Zeros, because what is masked is still multiplied.
        def room(slots: int, length: int) -> list[torch.Tensor]:
            return [like.new_zeros(slots, kv_heads, length, head_dim) for _ in range(2 * layers)]

        self.rows, self.row_length, self.trunks, self.trunk_length = rows, row_length, trunks, trunk_length
        own, shared = room(rows, row_length), room(trunks, trunk_length)
        self.own = list(zip(own[::2], own[1::2], strict=True))  # keys, values of each layer: [rows, Hkv, length, D]
        self.trunk = list(zip(shared[::2], shared[1::2], strict=True))

    def holds(self, rows: int, row_length: int, trunks: int, trunk_length: int) -> bool:
        return (
            self.rows >= rows
            and self.row_length >= row_length
            and self.trunks >= trunks
            and self.trunk_length >= trunk_length
        )

    def move_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        _move(self.own, sources, targets, length)

    def move_trunks(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        _move(self.trunk, sources, targets, length)


def _move(
    layers: list[tuple[torch.Tensor, torch.Tensor]], sources: Sequence[int], targets: Sequence[int], length: int
) -> None:
    if sources:
        source, target = torch.tensor(sources), torch.tensor(targets)
        for pair in layers:
            for tensor in pair:
                tensor[target, :, :length] = tensor[source, :, :length]


@dataclass(frozen=True)
class Prefill:
    """Trunks laid one after the other in one row of tokens: (slot, start, length) of each."""

    cache: BranchCache
    spans: list[tuple[int, int, int]]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q [N, Hkv, G, D], k and v [N, Hkv, D] → [N, Hkv, G, D]."""
        keys, values = self.cache.trunk[layer]
        parts = []
        for slot, start, length in self.spans:
            span = slice(start, start + length)
            keys[slot, :, :length] = k[span].transpose(0, 1)
            values[slot, :, :length] = v[span].transpose(0, 1)
            part = F.scaled_dot_product_attention(
                q[span].flatten(1, 2).transpose(0, 1)[None],
                k[span].transpose(0, 1)[None],
                v[span].transpose(0, 1)[None],
                is_causal=True,
                scale=scale,
                enable_gqa=True,
            )
            parts.append(part[0].transpose(0, 1).unflatten(1, q.shape[1:3]))
        return torch.cat(parts)


class Decode:
    """One more token of each row: `lengths` are the tokens that the rows hold already, `slots` and `offsets` say
    where each leaves which trunk."""

    def __init__(self, cache: BranchCache, lengths: list[int], slots: list[int], offsets: list[int]):
        device = cache.own[0][0].device
        self.cache = cache
        self.rows = len(lengths)
        self.positions = torch.tensor(lengths, device=device)
        self.row_ids = torch.arange(self.rows, device=device)
        self.longest = max(lengths) + 1
        even = min(lengths) == max(lengths)
        self.own_mask = None if even else _beyond(self.positions + 1, self.longest, cache)[:, None, None]
        self._place_in_trunks(slots, offsets, device)

    def _place_in_trunks(self, slots: list[int], offsets: list[int], device: torch.device) -> None:
        """Queries are gathered trunk by trunk: [trunks, most rows of one trunk], the gaps filled with row 0."""
        rows_of: list[list[int]] = [[] for _ in range(max(slots) + 1)]
        for row, slot in enumerate(slots):
            rows_of[slot].append(row)
        self.trunks, widest = len(rows_of), max(map(len, rows_of))
        gather = [row for rows in rows_of for row in rows + [0] * (widest - len(rows))]
        place = [0] * self.rows
        for slot, rows in enumerate(rows_of):
            for column, row in enumerate(rows):
                place[row] = slot * widest + column
        self.in_order = gather == list(range(self.rows))
        self.gather = torch.tensor(gather, device=device)
        self.place = torch.tensor(place, device=device)
        self.trunk_longest = max(offsets)
        self.trunk_mask = None
        if min(offsets) < self.trunk_longest:
            ends = torch.tensor(offsets, device=device)[self.gather].view(self.trunks, widest)
            self.trunk_mask = _beyond(ends, self.trunk_longest, self.cache)[:, None]  # [trunks, 1, widest, keys]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q [R, Hkv, G, D], k and v [R, Hkv, D] → [R, Hkv, G, D]."""
        own_k, own_v = (tensor[: self.rows, :, : self.longest] for tensor in self.cache.own[layer])
        own_k[self.row_ids, :, self.positions] = k
        own_v[self.row_ids, :, self.positions] = v
        own, own_lse = _attention(q, own_k, own_v, self.own_mask, scale)
        trunk_k, trunk_v = (tensor[: self.trunks, :, : self.trunk_longest] for tensor in self.cache.trunk[layer])
        groups = q.shape[2]
        gathered = q if self.in_order else q.index_select(0, self.gather)
        folded = gathered.unflatten(0, (self.trunks, -1)).transpose(1, 2).flatten(2, 3)  # [T, Hkv, W·G, D]
        mask = None if self.trunk_mask is None else self.trunk_mask.repeat_interleave(groups, dim=2)
        shared, shared_lse = _attention(folded, trunk_k, trunk_v, mask, scale)
        shared = shared.unflatten(2, (-1, groups)).transpose(1, 2).flatten(0, 1)
        shared_lse = shared_lse.unflatten(2, (-1, groups)).transpose(1, 2).flatten(0, 1)
        if not self.in_order:
            shared, shared_lse = shared.index_select(0, self.place), shared_lse.index_select(0, self.place)
        return torch.lerp(shared, own, torch.sigmoid(own_lse - shared_lse)[..., None])


def _beyond(ends: torch.Tensor, length: int, cache: BranchCache) -> torch.Tensor:
    """Additive mask [..., length]: -inf at positions that are not before `ends` [...]."""
    mask = torch.zeros(*ends.shape, length, dtype=cache.own[0][0].dtype, device=ends.device)
    return mask.masked_fill_(torch.arange(length, device=ends.device) >= ends[..., None], float("-inf"))


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp: q [B, H, Q, D], k and v [B, H, K, D] → [B, H, Q, D], [B, H, Q]."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    scores = (q @ k.transpose(2, 3)) * scale
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(dim=-1)
    return torch.exp(scores - lse[..., None]) @ v, lse


def branch_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, N, D]
    key: torch.Tensor,  # [1, Hkv, N, D]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sampling: Prefill | Decode | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention through the cache that travels with the forward call. Returns [1, N, H, D].

    Raises UnsupportedAttention where an option would change the values.
    """
    check_options(options)
    if sampling is None:
        raise ValueError("this model attends through a BranchCache: its forward call must carry `sampling`")
    kv_heads = key.shape[1]
    q = query[0].transpose(0, 1).unflatten(1, (kv_heads, -1))
    layer: Any = module.layer_idx
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    output = sampling.attend(layer, q, key[0].transpose(0, 1), value[0].transpose(0, 1), scale)
    return output.flatten(1, 2)[None], None


AttentionInterface.register(ATTENTION_NAME, branch_attention)
