"""Our own engine over transformers' models: continuous batching on a static cache of trunks and branches.

It starts in seconds and is the fallback where vLLM is not installed; `srl-rlvr doctor --measure` tells which of the two
is faster on a machine. Prompts that are prefixes of one another (the steps of one problem) and all samples of a group
share one trunk, computed once. Weights are views into the buffer that the learner hands over: nothing is copied.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srl_rlvr.engines import Completion, SamplingSpec, check_room
from srl_rlvr.engines.adapters import Adapter
from srl_rlvr.engines.branch_cache import ATTENTION_NAME, BranchCache, Decode, Prefill
from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models, bfloat16, vision
from srl_rlvr.policies.attention import UnsupportedAttention, obstacle_to_trees
from srl_rlvr.policies.weights import Manifest, unflatten


@dataclass
class _Trunk:
    """Prompts that are prefixes of the longest of them."""

    token_ids: list[int]
    images: Sequence[bytes] = ()
    offsets: set[int] = field(default_factory=set)  # lengths of its prompts
    slot: int = -1
    open: int = 0  # samples that wait or run
    logits: dict[int, torch.Tensor] = field(default_factory=dict)  # by offset, after each of its prompts
    shift: int = 0  # to be added to the count of a token that follows, as its position


@dataclass
class _Row:
    """One sample on its way."""

    trunk: _Trunk
    offset: int
    limit: int
    uniforms: np.ndarray  # [limit]: what each of its draws will be, whatever runs beside it
    completion: Completion = field(default_factory=lambda: Completion([], [], "length"))
    stop: int = 0  # which of the spec's stops it reads up to,
    begin: int = 0  # from this token of the completion on
    ended: bool = False


@dataclass
class _Group:
    """Samples of one prompt that still wait."""

    trunk: _Trunk
    rows: deque[_Row]


class TransformersEngine:
    def __init__(
        self,
        model: Path,
        *,
        max_running: int,
        max_context: int,
        kv_cache_gib: float,
        matmul: str = "float32",
        **_vllm_only: Any,
    ):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model
        self.network = base_models.load_model(model).to(self.device).requires_grad_(False)
        self.in_bfloat16 = matmul == "bfloat16"
        self.tokenizer = base_models.load_tokenizer(model)
        of_model = self.network.generation_config and self.network.generation_config.eos_token_id
        self.ends = {self.tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])}
        self.reader = vision.reader_of(model, self.network)
        self.max_running = max_running
        self.max_context = max_context
        self.cache_bytes = kv_cache_gib * 2**30
        self.version = 0
        self._adapters: dict[str, Adapter] = {}  # by the name of the weight that they stand beside
        self._holds_base = True
        self._cache: BranchCache | None = None
        self._adopt_branch_attention()
        if self.in_bfloat16:
            bfloat16.hold(self.network)

    def _adopt_branch_attention(self) -> None:
        """Raises InputError where attention through a BranchCache would change what the model computes."""
        obstacle = obstacle_to_trees(self.network)
        try:
            if obstacle is None:
                self.network.get_decoder().set_attn_implementation(ATTENTION_NAME)
                self.sample([[0]], SamplingSpec(1, 0.0, 2))
        except UnsupportedAttention as unsupported:
            obstacle = str(unsupported)
        if obstacle is not None:
            kind = self.network.config.model_type
            raise InputError(
                f"model type '{kind}' cannot be run by the transformers engine ({obstacle}); set engine.kind to vllm"
            )

    @torch.inference_mode()
    def sample(
        self,
        prompts: list[list[int]],
        spec: SamplingSpec,
        images: Sequence[Sequence[bytes]] = (),
        seeds: Sequence[int] = (),
    ) -> list[list[Completion]]:
        """See `Engine`. The draws of a sample depend on the seed and its place alone, not on what runs beside it.

        `seeds` are those of each prompt, in the place of the spec's: the draws then depend on no other prompt, either.
        """
        check_room(prompts, self.max_context)
        if images and self.reader is None:
            raise InputError(f"model {self.model} takes no images; use one with a vision tower")
        groups = self._groups(prompts, spec, images or [()] * len(prompts), seeds)
        result = [[row.completion for row in group.rows] for group in groups]
        waiting, rows = deque(groups), []
        cache = self._room_for(groups, spec)
        slots: list[_Trunk] = []
        while waiting or rows:
            fresh = self._admit(waiting, cache, rows, slots)
            if fresh:
                logits = torch.stack([row.trunk.logits[row.offset] for row in fresh])
                self._extend(fresh, logits, spec)
            rows = self._retire(rows + fresh, cache, slots)
            if rows:
                self._extend(rows, self._decode(rows, cache), spec)
                rows = self._retire(rows, cache, slots)
        return result

    def load(self, buffer: np.ndarray | torch.Tensor, manifest: Manifest) -> str:
        """See `Engine`. Full weights are read where they lie, and `buffer` is kept until the next ones come."""
        tensors = dict(unflatten(buffer, manifest))
        if manifest.lora_scale is None:
            for adapter in self._adapters.values():
                adapter.drop()
            self._take(tensors)
            self._holds_base = False
        else:
            if not self._holds_base:
                self._take(dict(base_models.load_model(self.model).named_parameters()))
                self._holds_base = True
            for name in {name.rpartition(".lora_")[0] for name in tensors}:
                if name not in self._adapters:
                    self._adapters[name] = Adapter(self.network.get_submodule(name.removesuffix(".weight")))
                self._adapters[name].hold([(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"])], manifest.lora_scale)
        self.version = manifest.version
        return manifest.checksum

    @torch.no_grad()
    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.network.named_parameters():
            if self.device.type == "cpu":
                parameter.data = tensors[name].data
            else:
                parameter.data.copy_(tensors[name])
        if self.in_bfloat16:
            bfloat16.hold(self.network)

    def _groups(
        self, prompts: list[list[int]], spec: SamplingSpec, images: Sequence[Sequence[bytes]], seeds: Sequence[int]
    ) -> list[_Group]:
        """A group for each prompt, each with the trunk it shares with its neighbours."""
        trunks: list[_Trunk] = []
        groups: list[_Group] = []
        draws = np.random.default_rng(spec.seed)
        for number, (prompt, shown) in enumerate(zip(prompts, images, strict=True)):
            trunk = trunks[-1] if trunks else None
            shared = min(len(prompt), len(trunk.token_ids)) if trunk else 0
            if trunk is None or prompt[:shared] != trunk.token_ids[:shared] or list(shown) != list(trunk.images):
                trunks.append(trunk := _Trunk(prompt, shown))
            elif len(prompt) > shared:
                trunk.token_ids = prompt
            trunk.offsets.add(len(prompt))
            trunk.open += spec.samples
            limit = min(spec.max_tokens, self.max_context - len(prompt))
            if seeds:
                draws = np.random.default_rng(seeds[number])
            uniforms = draws.random((spec.samples, spec.max_tokens))
            rows = deque(_Row(trunk, len(prompt), limit, of_row) for of_row in uniforms)
            groups.append(_Group(trunk, rows))
        return groups

    def _room_for(self, groups: list[_Group], spec: SamplingSpec) -> BranchCache:
        """The cache for as many running rows as `max_running` and the memory for keys and values allow."""
        config = self.network.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * head_dim * 4
        trunk_length = max(len(group.trunk.token_ids) for group in groups)
        # Twice the trunks that fill the rows: a trunk waits for the last of its own while others begin.
        row_trunks = 2 / (min(len(group.trunk.offsets) for group in groups) * spec.samples)
        row_bytes = token_bytes * (spec.max_tokens + trunk_length * min(row_trunks, 1))
        rows = max(1, min(self.max_running, len(groups) * spec.samples, int(self.cache_bytes / row_bytes)))
        trunks = min(rows, math.ceil(rows * row_trunks), len({id(group.trunk) for group in groups}))
        if self._cache is None or not self._cache.holds(rows, spec.max_tokens, trunks, trunk_length):
            self._cache = None
            like = next(self.network.parameters()).detach()
            self._cache = BranchCache(
                config.num_hidden_layers, heads, head_dim, rows, spec.max_tokens, trunks, trunk_length, like
            )
        return self._cache

    def _admit(self, waiting: deque[_Group], cache: BranchCache, rows: list[_Row], slots: list[_Trunk]) -> list[_Row]:
        """Rows that start now: groups in order, whole where they fit at all; their trunks are computed together."""
        fresh: list[_Row] = []
        new_trunks: list[_Trunk] = []
        while waiting:
            group = waiting[0]
            free = cache.rows - len(rows) - len(fresh)
            unplaced = group.trunk.slot < 0
            if free < min(len(group.rows), cache.rows) or (unplaced and len(slots) == cache.trunks):
                break
            if unplaced:
                group.trunk.slot = len(slots)
                slots.append(group.trunk)
                new_trunks.append(group.trunk)
            fresh += [group.rows.popleft() for _ in range(min(free, len(group.rows)))]
            if not group.rows:
                waiting.popleft()
        if new_trunks:
            self._prefill(new_trunks, cache)
        return fresh

    def _prefill(self, trunks: list[_Trunk], cache: BranchCache) -> None:
        """Keys and values of `trunks`, and the logits after each of their prompts."""
        spans, ids, positions, wanted = [], [], [], []
        for trunk in trunks:
            spans.append((trunk.slot, len(ids), len(trunk.token_ids)))
            wanted += [(trunk, offset, len(ids) + offset - 1) for offset in sorted(trunk.offsets)]
            ids += trunk.token_ids
            positions.append(self._positions(trunk))
        keep = torch.tensor([position for _, _, position in wanted], device=self.device)
        shown = [image for trunk in trunks for image in trunk.images]
        logits = self._forward(ids, np.concatenate(positions, axis=-1), Prefill(cache, spans), keep, shown)
        for (trunk, offset, _), row in zip(wanted, logits, strict=True):
            trunk.logits[offset] = row

    def _decode(self, rows: list[_Row], cache: BranchCache) -> torch.Tensor:
        """Logits [rows, V] after the last token of each row."""
        lengths = [len(row.completion.token_ids) - 1 for row in rows]  # the last token is fed in now
        step = Decode(cache, lengths, [row.trunk.slot for row in rows], [row.offset for row in rows])
        ids = [row.completion.token_ids[-1] for row in rows]
        positions = [row.offset + row.trunk.shift + n for row, n in zip(rows, lengths, strict=True)]
        return self._forward(ids, np.array(positions), step, 0)

    def _positions(self, trunk: _Trunk) -> np.ndarray:
        """[N], or [axes, N] of a model that has several."""
        if self.reader is None or not self.reader.has_axes:
            return np.arange(len(trunk.token_ids))
        positions = self.reader.positions(self.network, trunk.token_ids, trunk.images)
        trunk.shift = int(positions[0, -1]) - len(trunk.token_ids) + 1
        return positions

    def _forward(
        self, ids: list[int], positions: np.ndarray, sampling: Any, keep: Any, images: Sequence[bytes] = ()
    ) -> torch.Tensor:
        tokens = torch.tensor(ids, device=self.device)
        inputs = {"input_ids": tokens[None]}
        if images and self.reader is not None:
            embedded = self.reader.embed(self.network, tokens, torch.ones_like(tokens, dtype=torch.bool), images)
            inputs = {"inputs_embeds": embedded[None]}
        output = self.network(
            **inputs,
            position_ids=torch.from_numpy(positions).to(self.device)[..., None, :],
            use_cache=False,
            sampling=sampling,
            logits_to_keep=keep,
        )
        return output.logits[0].float()

    def _extend(self, rows: list[_Row], logits: torch.Tensor, spec: SamplingSpec) -> None:
        """One more token for each row, and whether it ends with it."""
        uniforms = [row.uniforms[len(row.completion.token_ids)] for row in rows]
        tokens, logprobs = _draw(logits, spec.temperature, torch.tensor(uniforms, device=self.device))
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            completion = row.completion
            completion.token_ids.append(token)
            completion.logprobs.append(logprob)
            if token in self.ends or self._stops(row, spec.stops):
                completion.finish_reason, row.ended = "stop", True
            elif len(completion.token_ids) == row.limit:
                row.ended = True

    def _stops(self, row: _Row, stops: tuple[str, ...]) -> bool:
        """Whether the row has come to the end of the last of `stops`; one that is not the last is passed."""
        if not stops:
            return False
        stop = stops[row.stop]
        # A token is at least one byte, so the decoded end is long enough to hold the stop.
        if stop not in self.tokenizer.decode(row.completion.token_ids[row.begin :][-len(stop) - 1 :]):
            return False
        row.stop, row.begin = row.stop + 1, len(row.completion.token_ids)
        return row.stop == len(stops)

    @staticmethod
    def _retire(rows: list[_Row], cache: BranchCache, slots: list[_Trunk]) -> list[_Row]:
        """The rows that go on, and their trunks, packed at the front of the cache."""
        for row in rows:
            row.trunk.open -= row.ended
            if not row.trunk.open:
                row.trunk.logits.clear()  # the trunk lives as long as the call
        alive, sources, targets = _packed([not row.ended for row in rows])
        length = max((len(rows[i].completion.token_ids) for i in sources), default=0)
        cache.move_rows(sources, targets, length)
        kept, sources, targets = _packed([trunk.open > 0 for trunk in slots])
        length = max((len(slots[i].token_ids) for i in sources), default=0)
        cache.move_trunks(sources, targets, length)
        slots[:] = [slots[i] for i in kept]
        for slot, trunk in enumerate(slots):
            trunk.slot = slot
        return [rows[i] for i in alive]


def _packed(keep: list[bool]) -> tuple[list[int], list[int], list[int]]:
    """The new order of what is kept, the last ones moved into the gaps; and which place moves (source) to which."""
    count = sum(keep)
    targets = [i for i in range(count) if not keep[i]]
    sources = [i for i in range(count, len(keep)) if keep[i]]
    order = list(range(count))
    for source, target in zip(sources, targets, strict=True):
        order[target] = source
    return order, sources, targets


def _draw(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows] and their log-probabilities at `temperature` (at 1 where it is 0, greedy): inverse transform."""
    if temperature not in (0, 1):
        logits = logits / temperature
    normalizer = logits.logsumexp(dim=-1, keepdim=True)
    if temperature == 0:
        tokens = logits.argmax(dim=-1, keepdim=True)
    else:
        cumulated = torch.exp(logits - normalizer).cumsum(dim=-1)
        point = uniforms[:, None].to(cumulated.dtype) * cumulated[:, -1:]
        tokens = torch.searchsorted(cumulated, point, right=True).clamp_(max=logits.shape[-1] - 1)
    return tokens[:, 0], (logits.gather(1, tokens) - normalizer)[:, 0]
