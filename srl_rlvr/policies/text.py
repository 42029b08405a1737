"""The text policy: a causal language model that learns from samples of tokens.

One update: samples → trees → forests of packs → log-probabilities of completion tokens → loss → one optimizer step.
It takes tokens and gives metrics; it never sees text, rewards or Ray. With several workers each takes its share
of the trees and gradients are averaged by DDP (or sharded by FSDP2), with the same result.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models, bfloat16, vision, weights
from srl_rlvr.policies.attention import TreePass, TrunkMemory, adopt_tree_attention
from srl_rlvr.policies.losses import (
    SUMS,
    UpdateSpec,
    averages,
    check_finite,
    cross_entropy_loss,
    likelihood_loss,
    policy_gradient_loss,
    preference_weights,
)
from srl_rlvr.policies.output_head import head_logprobs
from srl_rlvr.policies.prefix_tree import Forest, Pack, Tree, build_trees, plant, plant_one_by_one

_BETAS = (0.9, 0.99)


class CompletionLogprobs(torch.nn.Module):
    """log π(token | prefix) of every completion token of a pack; what DDP or FSDP wraps."""

    def __init__(self, model: Any, shares_prefixes: bool, reader: vision.ImageReader | None):
        super().__init__()
        self.model = model
        self.shares_prefixes = shares_prefixes
        self.reader = reader

    def forward(self, pack: Pack, temperature: float | None, memory: TrunkMemory, writes: bool) -> torch.Tensor:
        """[T], at `temperature`; only completion positions go through the output head, a chunk at a time.

        Without a temperature nothing does: the pass is for what it writes into the memory, and returns nothing [0].
        """
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        options: dict[str, Any] = {"tree_pass": TreePass(pack.layout, memory, writes)} if self.shares_prefixes else {}
        if pack.prompt_mask is None:
            options["input_ids"] = pack.token_ids[None]
        elif self.reader is not None:
            embedded = self.reader.embed(self.model, pack.token_ids, pack.prompt_mask, pack.images)
            options["inputs_embeds"] = embedded[None]
        else:
            raise ValueError("samples with images, but the model takes none")
        hidden = decoder(position_ids=pack.position_ids[..., None, :], use_cache=False, **options).last_hidden_state[0]
        if temperature is None:
            return hidden[:0, 0]
        return head_logprobs(head, hidden.index_select(0, pack.predictors), pack.targets, temperature)


class TextPolicy:
    """A language model, its optimizer, and (where KL is wanted) a frozen reference.

    `notices` are sentences for the user about how this model is trained.
    """

    def __init__(
        self,
        model: Path,
        *,
        lora_rank: int = 0,
        lora_alpha: float = 32.0,
        matmul: str = "float32",
        tokens_per_microbatch: int = 1024,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        strategy: str = "ddp",
        activation_checkpointing: bool = False,
        device: str = "cpu",
        seed: int = 0,
    ):
        torch.manual_seed(seed)  # LoRA's A matrices are drawn
        self.device = torch.device(device)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.token_budget = tokens_per_microbatch
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.lora_scale = lora_alpha / lora_rank if lora_rank else None
        self.version = 0
        network = base_models.load_model(model).to(self.device)
        _check_output_head(network)
        obstacle = adopt_tree_attention(network)
        self.reader = vision.reader_of(model, network)
        self.attention = network.get_decoder().config._attn_implementation
        self.shares_prefixes = obstacle is None
        self.notices = [] if obstacle is None else [
            f"Model type '{network.config.model_type}' cannot be trained as prefix trees ({obstacle}): every sample is "
            "computed with its whole prompt, with the same result but more work."
        ]  # fmt: skip
        if lora_rank:
            from peft import LoraConfig, get_peft_model

            network = get_peft_model(
                network,
                LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear"),  # type: ignore[arg-type]
            )
        if matmul == "bfloat16":
            bfloat16.hold(network)
        if activation_checkpointing:
            for layer in _decoder_layers(_inner(network)):
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        trained = (parameter for parameter in network.parameters() if parameter.requires_grad)
        is_whole = self.world == 1 or strategy == "ddp"
        self.flat = weights.share_storage(trained) if is_whole else None
        self.network: Any = network
        self.shapes = tuple(
            (_plain_name(name), tuple(p.shape)) for name, p in network.named_parameters() if p.requires_grad
        )
        module = CompletionLogprobs(_inner(network), self.shares_prefixes, self.reader)
        self.forward: Any = self._distribute(module, strategy)
        self.reference: dict[str, torch.Tensor] | None = None
        self.optimizer = self._new_optimizer()

    def begin_stage(self, keep_reference: bool) -> None:
        """A fresh optimizer and, if asked, the present weights as the reference of the KL term."""
        self.optimizer = self._new_optimizer()
        self.reference = None
        if keep_reference:
            trained = ((name, p) for name, p in self.network.named_parameters() if p.requires_grad)
            self.reference = {name: p.detach().clone() for name, p in trained}

    def update(self, samples: pa.Table, spec: UpdateSpec) -> dict[str, float]:
        """Learn from one batch (a Sample table); every worker is given the whole batch and takes its share.

        Under the preference loss the table holds pairs: a chosen answer and then a rejected one.
        Returns metrics averaged over completion tokens: loss, kl, clip_fraction, entropy (estimated by -log π of
        the sampled tokens), divergence (k3 estimate of KL(engine || learner) before the update), grad_norm; of pairs
        the loss is averaged over them, and `preferred` is the share whose chosen answer has the larger margin.
        A behaviour log-probability of NaN marks an expert's token, which no engine drew: its importance weight is 1,
        and it counts for neither entropy nor divergence.
        Raises ValueError where a prompt is no prefix of its trunk or the loss is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = spec.learning_rate
        trees = self._trees(samples)
        minibatches = [trees[i :: spec.updates] for i in range(spec.updates)]
        columns = _token_columns(samples)
        if spec.loss == "preference":
            return self._prefer(trees, samples, columns, spec)
        old = self._logprobs(trees, samples, spec.temperature) if spec.updates > 1 else None
        totals: list[dict[str, float]] = []
        for minibatch in minibatches:
            if minibatch:
                totals.append(self._step(minibatch, columns, old, spec))
        self.version += 1
        return {name: float(np.mean([total[name] for total in totals])) for name in totals[0]}

    def _prefer(
        self, trees: Sequence[Tree], samples: pa.Table, columns: dict[str, Any], spec: UpdateSpec
    ) -> dict[str, float]:
        """One step of DPO: the weights of the answers first, then the gradient of their weighted log-likelihood."""
        if self.reference is None:
            raise ValueError("the preference loss needs a reference, but begin_stage kept none")
        now = self._logprobs(trees, samples, spec.temperature)
        with self._swapped(self.reference):
            reference = self._logprobs(trees, samples, spec.temperature)
        ratios_B = torch.tensor([float((p.astype(np.float64) - q).sum()) for p, q in zip(now, reference, strict=True)])
        losses_P, weights_P_2 = preference_weights(ratios_B.reshape(-1, 2), spec.beta)
        columns["advantage"] = weights_P_2.flatten().numpy()
        metrics = self._step(trees, columns, None, spec)
        self.version += 1
        preferred = (ratios_B[::2] > ratios_B[1::2]).double().mean()
        return metrics | {"loss": float(losses_P.mean()), "preferred": float(preferred)}

    def logprobs(self, samples: pa.Table, temperature: float = 1.0) -> list[np.ndarray]:
        """log π of each sample's completion tokens, in the order of the table."""
        return self._logprobs(self._trees(samples), samples, temperature)

    def export(self) -> tuple[torch.Tensor, weights.Manifest]:
        """What a generator needs to serve this version, as one flat float32 tensor: all weights, or only the adapters
        under LoRA. It is the storage that the policy learns in (a copy only where weights are sharded): put it
        somewhere before the next update."""
        self.optimizer.zero_grad(set_to_none=True)  # what takes the weights in may need the room
        flat = self.flat
        if flat is None:
            flat = weights.flatten(t for name, t in _full_tensors(self.network) if self._is_trained(name))
        return flat, weights.Manifest(self.version, self.shapes, weights.checksum(flat), self.lora_scale)

    def save(self, folder: Path) -> None:
        """Everything a resumed run needs, bit for bit: trained weights, optimizer state, reference, version.

        Raises OSError where it cannot be written.
        """
        state = {
            "weights": {name: t for name, t in _full_tensors(self.network) if self._is_trained(name)},
            "optimizer": tree_map(_whole, self.optimizer.state_dict()),
            "reference": tree_map(_whole, self.reference),
            "version": self.version,
        }
        if self.rank:
            return
        weights.write_state(state, folder / "learner.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "learner.pt", map_location=self.device, weights_only=True, mmap=True)
        parameters = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, tensor in state["weights"].items():
                parameters[name].copy_(_like(tensor, parameters[name]))
        self.optimizer = self._new_optimizer()
        self.optimizer.load_state_dict(self._sharded_optimizer_state(state["optimizer"]))
        self.reference = None
        if state["reference"] is not None:
            reference = state["reference"].items()
            self.reference = {name: _like(tensor, parameters[name]).clone() for name, tensor in reference}
        self.version = state["version"]

    def save_model(self, folder: Path, card: dict[str, Any]) -> None:
        """The model in Hugging Face layout with its card; adapters are merged, and lie beside it in PEFT's layout, too.
        The tokenizer is the caller's."""
        whole = dict(_full_tensors(self.network))
        named = {_plain_name(name): tensor for name, tensor in whole.items()}
        if self.rank:
            return
        if self.lora_scale is not None:
            self.network.peft_config["default"].base_model_name_or_path = card.get("base")
            self.network.save_pretrained(folder / "adapter", state_dict=whole, save_embedding_layers=False)
            adapters = {name: tensor for name, tensor in named.items() if ".lora_" in name}
            base = ((name, tensor) for name, tensor in named.items() if ".lora_" not in name)
            named = dict(weights.merge_lora(base, adapters, self.lora_scale))
        network = _inner(self.network)
        kept = network.state_dict().keys()  # of a router, say; a buffer that is computed is not among them
        named |= {name: buffer for name, buffer in network.named_buffers() if name in kept}
        decoder = network.get_decoder()
        decoder.config._attn_implementation_internal = None
        try:
            network.save_pretrained(folder, state_dict={name: t.cpu().contiguous() for name, t in named.items()})
        finally:
            decoder.set_attn_implementation(self.attention)
        (folder / "model_card.json").write_text(json.dumps(card, indent=2) + "\n")

    def _step(
        self, trees: Sequence[Tree], columns: dict[str, Any], old: list[np.ndarray] | None, spec: UpdateSpec
    ) -> dict[str, float]:
        """One optimizer step on `trees`."""
        samples_seen = sum(len(tree.branches) for tree in trees)
        tokens_seen = sum(len(branch.completion) for tree in trees for branch in tree.branches)
        denominator = samples_seen * spec.constant_length if spec.constant_length else tokens_seen
        if spec.loss == "preference":
            denominator = samples_seen / 2  # pairs
        sums = dict.fromkeys(SUMS, 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        forests = self._share(trees)
        for index, passes in enumerate(forests):
            # Workers' gradients are averaged, so each worker's sum is scaled up by their number.
            scale = self.world / denominator
            found = self._backward(passes, columns, old, spec, scale, synchronize=index == len(forests) - 1)
            sums = {name: value + found[name] for name, value in sums.items()}
        if self.world > 1:
            total = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
            dist.all_reduce(total)
            sums = dict(zip(sums, total.tolist(), strict=True))
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        norm = float(_whole(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)))
        metrics = averages(sums, tokens_seen, denominator) | {"grad_norm": norm}
        check_finite(metrics, self.version)
        self.optimizer.step()
        return metrics

    def _backward(
        self,
        passes: list[tuple[Pack, float]],
        columns: dict[str, Any],
        old: list[np.ndarray] | None,
        spec: UpdateSpec,
        scale: float,
        synchronize: bool,
    ) -> dict[str, float]:
        """Adds the gradient of one forest; returns its sums of metrics.

        The trunks go forward twice: first only for the keys and values that branches read, and last with the gradients
        that the branches left there. So one pack's activations are held at a time, however large a tree is.
        """
        # The reference comes first: swapping weights between a forward pass and its backward would spoil the gradient.
        packs = [pack for pack, _ in passes]
        references = self._reference_logprobs(packs, spec.temperature) if spec.kl else [None] * len(packs)
        memory = TrunkMemory()
        if len(packs) > 1:
            with torch.no_grad():
                self.forward(packs[0], None, memory, writes=True)
        sums = dict.fromkeys(SUMS, 0.0)
        for number in (*range(1, len(packs)), 0):
            pack, weight = passes[number]
            with contextlib.nullcontext() if synchronize and number == 0 else self._no_sync():
                logprobs_T = self.forward(pack, spec.temperature, memory, writes=number == 0)
                found, loss = self._loss(logprobs_T, pack, references[number], columns, old, spec)
                tensors, gradients = memory.written()
                torch.autograd.backward([loss * (weight * scale), *tensors], [torch.ones_like(loss), *gradients])
            sums = {name: value + weight * found[name] for name, value in sums.items()}
        return sums

    def _loss(
        self,
        logprobs_T: torch.Tensor,
        pack: Pack,
        reference_T: torch.Tensor | None,
        columns: dict[str, Any],
        old: list[np.ndarray] | None,
        spec: UpdateSpec,
    ) -> tuple[dict[str, float], torch.Tensor]:
        now_T = logprobs_T.detach()
        flat_T = columns["starts"][pack.token_rows.cpu().numpy()] + pack.token_indices.cpu().numpy()
        behavior_T = torch.from_numpy(columns["behavior"][flat_T]).to(self.device)
        drawn_T = ~behavior_T.isnan()  # the rest are an expert's tokens
        if spec.loss == "cross_entropy":
            result = cross_entropy_loss(logprobs_T)
            divergence = 0.0
        elif spec.loss == "preference":
            weights_T = torch.from_numpy(columns["advantage"]).to(self.device)[pack.token_rows]
            result = likelihood_loss(logprobs_T, weights_T)
            divergence = 0.0
        else:
            advantages_T = torch.from_numpy(columns["advantage"]).to(self.device)[pack.token_rows]
            old_T = now_T
            if old is not None:
                old_T = torch.from_numpy(np.concatenate(old)[flat_T]).to(self.device)
            behavior_T = torch.where(drawn_T, behavior_T, old_T)
            result = policy_gradient_loss(logprobs_T, old_T, behavior_T, advantages_T, reference_T, spec)
            gap = (old_T - behavior_T).double()
            divergence = float((torch.expm1(gap) - gap).sum())
        sums = {
            "loss": float(result.loss.detach()),
            "kl": float(result.kl),
            "clip_fraction": float(result.clipped),
            "entropy": float(-now_T[drawn_T].sum()),
            "divergence": divergence,
            "drawn": float(drawn_T.sum()),
        }
        return sums, result.loss

    def _share(self, trees: Sequence[Tree]) -> list[list[tuple[Pack, float]]]:
        """This worker's forests, as passes and what they weigh.

        A worker makes passes of weight 0 where it would otherwise miss a collective: DDP's average of the gradients
        needs one of everyone, FSDP gathers weights at each.
        """
        of_worker = [list(self._plant(trees[rank :: self.world])) for rank in range(self.world)]
        mine = [[(pack, 1.0) for pack in forest.packs] for forest in of_worker[self.rank]]
        any_trunks = next(forest.trunks for forests in of_worker for forest in forests)
        if not mine:
            mine = [[(any_trunks, 0.0)]]
        if _is_sharded(self.network):
            for index, forests in enumerate(itertools.zip_longest(*of_worker)):
                if index == len(mine):
                    mine.append([])
                missing = max(len(forest.packs) for forest in forests if forest) - len(mine[index])
                mine[index] += [(any_trunks, 0.0)] * missing
        return mine

    def _trees(self, samples: pa.Table) -> list[Tree]:
        trees = build_trees(samples)
        if self.reader is None or not self.reader.has_axes:
            return trees
        network = _inner(self.network)
        positions = (self.reader.positions(network, tree.trunk, tree.images) for tree in trees)
        return [replace(tree, positions=of_tree) for tree, of_tree in zip(trees, positions, strict=True)]

    def _plant(self, trees: Sequence[Tree]) -> Iterator[Forest]:
        grow = plant if self.shares_prefixes else plant_one_by_one
        return grow(trees, self.token_budget, self.device)

    @torch.no_grad()
    def _logprobs(self, trees: Sequence[Tree], samples: pa.Table, temperature: float) -> list[np.ndarray]:
        lengths = [len(ids) for ids in samples["completion_ids"].to_pylist()]
        found = [np.zeros(length, dtype=np.float32) for length in lengths]
        for forest in self._plant(trees):
            for pack, values in zip(forest.packs, self._passes(forest.packs, temperature), strict=True):
                places = zip(pack.token_rows.tolist(), pack.token_indices.tolist(), strict=True)
                for (row, index), value in zip(places, values.float().cpu().numpy(), strict=True):
                    found[row][index] = value
        return found

    @torch.no_grad()
    def _reference_logprobs(self, packs: Sequence[Pack], temperature: float) -> list[torch.Tensor]:
        """log π_ref [T] of each pack of a forest: the trained tensors are swapped for the reference's and back."""
        if self.reference is None:
            raise ValueError("KL asked for, but begin_stage kept no reference")
        with self._swapped(self.reference):
            return self._passes(packs, temperature)

    def _passes(self, packs: Sequence[Pack], temperature: float) -> list[torch.Tensor]:
        """log π [T] of each pack of a forest."""
        memory = TrunkMemory()
        return [self.forward(pack, temperature, memory, number == 0) for number, pack in enumerate(packs)]

    @contextlib.contextmanager
    def _swapped(self, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        named = dict(self.network.named_parameters())
        if _is_sharded(self.network):  # FSDP gathers from storage of its own, so values move and not tensors
            present = {name: named[name].detach().clone() for name in tensors}
            _copy_shards(tensors, named)
            try:
                yield
            finally:
                _copy_shards(present, named)
            return
        present = {name: named[name].data for name in tensors}
        for name, tensor in tensors.items():
            named[name].data = tensor
        try:
            yield
        finally:
            for name, tensor in present.items():
                named[name].data = tensor

    def _new_optimizer(self) -> torch.optim.AdamW:
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=0.0, betas=_BETAS, weight_decay=self.weight_decay)

    def _is_trained(self, name: str) -> bool:
        return self.lora_scale is None or ".lora_" in name

    def _distribute(self, module: CompletionLogprobs, strategy: str) -> Any:
        if self.world == 1:
            return module
        if strategy == "fsdp" and self.reader is None:  # a worker's pass without images would wait for the tower's
            return _shard(module)
        # Models' buffers are constants (rotary frequencies): nothing to broadcast at each forward pass.
        # DDP must not wait for what no loss reaches: LLaVA reads SigLIP before its last norm.
        return torch.nn.parallel.DistributedDataParallel(
            module, forward_sync_buffers=False, find_unused_parameters=self.reader is not None
        )

    def _no_sync(self) -> Any:
        return self.forward.no_sync() if hasattr(self.forward, "no_sync") else contextlib.nullcontext()

    def _sharded_optimizer_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` as saved, its moments cut as this policy's parameters are: DDP and FSDP read each other's."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            index: {key: _like(v, parameters[index]) if key != "step" else v for key, v in entry.items()}
            for index, entry in state["state"].items()
        }
        return state | {"state": moments}


def _token_columns(samples: pa.Table) -> dict[str, Any]:
    """Per-sample columns as arrays; token columns flattened, with each sample's start."""
    behavior = samples["behavior_logprobs"].combine_chunks()
    lengths = np.asarray(behavior.value_lengths(), dtype=np.int64)
    return {
        "starts": np.concatenate([[0], np.cumsum(lengths)[:-1]]),
        "behavior": behavior.flatten().to_numpy().copy(),
        "advantage": samples["advantage"].to_numpy().copy(),
    }


def _full_tensors(network: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Named parameters, gathered where they are sharded. Tied weights appear once, under their first name."""
    for name, parameter in network.named_parameters():
        yield name, _whole(parameter.detach())


def _whole(value: Any) -> Any:
    """A sharded tensor gathered; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor cut as `parameter` is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


@torch.no_grad()
def _copy_shards(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)


def _shard(module: CompletionLogprobs) -> Any:
    """FSDP2: layer by layer, then what is left. Everything is resharded after each pass, so that weights which were
    loaded or swapped are gathered anew."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for layer in _decoder_layers(module.model):
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(module, reshard_after_forward=True)
    for part in module.modules():
        if isinstance(part, FSDPModule) and dist.get_backend() == "gloo":
            part.set_force_sum_reduction_for_comms(True)  # gloo has no average
    return module


def _is_sharded(network: Any) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def _inner(network: Any) -> Any:
    """The transformers model below PEFT's wrapper; its layers keep their adapters."""
    return network.base_model.model if hasattr(network, "peft_config") else network


def _plain_name(name: str) -> str:
    """PEFT's parameter names as the base model's: `….q_proj.weight`, adapters as `….q_proj.weight.lora_A`."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    for side in ("lora_A", "lora_B"):
        name = name.replace(f".{side}.default.weight", f".weight.{side}")
    return name


def _decoder_layers(model: Any) -> Sequence[Any]:
    return model.get_decoder().layers


@torch.no_grad()
def _check_output_head(network: Any) -> None:
    """The head is applied here and not by the model's own forward, so the two are held to each other once.

    Raises InputError for models that scale or cap their logits after the head, or whose logits are not finite.
    """
    ids = torch.arange(8, device=network.device)[None] % network.config.get_text_config().vocab_size
    own = network(input_ids=ids, use_cache=False).logits[0, -1].float()
    hidden = network.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    ours = network.get_output_embeddings()(hidden).float()
    if not own.isfinite().all():
        raise InputError("the base model's logits are not finite (NaN or inf): its weights are damaged, or too large "
                         "for float32; use another copy of the model")  # fmt: skip
    if not torch.allclose(own, ours, atol=1e-3, rtol=1e-3):
        raise InputError(f"model type '{network.config.model_type}' changes its logits after the output head; "
                         "it cannot be trained here yet")  # fmt: skip
