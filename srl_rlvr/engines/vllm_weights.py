"""New weights inside vLLM's worker process. It is mixed into the worker by name (`worker_extension_cls`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from srl_rlvr.engines.adapters import Adapter


class WeightReceiver:
    """vLLM's `load_weights` fails on a CPU, whose layers hold prepacked copies. Its `reload_weights` works, but takes
    longer than giving each layer its new weight to pack, which is done here where every weight is known by name.
    """

    model_runner: Any
    adapters: dict[str, Adapter] | None = None

    def receive_weights(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        for adapter in (self.adapters or {}).values():
            adapter.drop()
        if not torch.cuda.is_available() and self._repack(dict(tensors)):
            return
        self.model_runner.reload_weights(weights_iterator=iter(tensors))
        if not torch.cuda.is_available():
            self._repack_head()

    def receive_adapters(self, adapters: dict[str, torch.Tensor], scale: float) -> None:
        """Beside the layers, which run eagerly on a CPU."""
        if self.adapters is None:
            self.adapters = {name: Adapter(layer) for name, layer, _ in self._adapted_layers(adapters)}
        for name, _, parts in self._adapted_layers(adapters):
            self.adapters[name].hold([(adapters[f"{p}.lora_A"], adapters[f"{p}.lora_B"]) for p in parts], scale)

    def merge_adapters(self, base: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor], scale: float) -> None:
        """Into the layers, in place: graphs that were captured on a GPU hold the address of their weights."""
        for _, layer, parts in self._adapted_layers(adapters):
            weight: Any = layer.weight
            for part, rows in zip(parts, weight.data.split([len(base[part]) for part in parts]), strict=True):
                up, down = (adapters[f"{part}.lora_{side}"].to(rows.device) for side in "BA")
                rows.copy_(torch.addmm(base[part].to(rows.device), up, down, alpha=scale))

    def _adapted_layers(self, adapters: dict[str, torch.Tensor]) -> Iterator[tuple[str, Any, list[str]]]:
        """(name, layer, weights that lie side by side in it) of every linear layer that has adapters."""
        from vllm.model_executor.layers.linear import LinearBase

        for name, layer in self.model_runner.get_model().named_modules():
            parts = self._parts(name, "weight")
            if isinstance(layer, LinearBase) and all(f"{part}.lora_A" in adapters for part in parts):
                yield name, layer, parts

    def _parts(self, layer: str, parameter: str) -> list[str]:
        """The learner's names of what lies side by side in a parameter of vLLM's (query, key and value in one)."""
        fused = getattr(self.model_runner.get_model(), "packed_modules_mapping", {})
        parent, _, last = layer.rpartition(".")
        return [f"{parent}.{part}.{parameter}".removeprefix(".") for part in fused.get(last, [last])]

    @torch.no_grad()
    def _repack(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Every layer gets its weights from `tensors`, one after the other; False, and nothing is done, where vLLM's
        model has parameters under names of its own."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        model = self.model_runner.get_model()
        places: list[tuple[Any, str, list[str]]] = []
        for name, _ in model.named_parameters():  # a head tied to the embeddings is none of its own
            of, _, key = name.rpartition(".")
            places.append((model.get_submodule(of), key, self._parts(of, key)))
        known = all(part in tensors for *_, parts in places for part in parts)
        linear = [layer for layer in model.modules() if isinstance(layer, LinearBase)]
        if not known or not all(isinstance(layer.quant_method, UnquantizedLinearMethod) for layer in linear):
            return False
        scratch: dict[torch.Size, torch.Tensor] = {}
        for layer, key, parts in places:
            pieces = [tensors[part] for part in parts]
            if key == "weight" and isinstance(layer, LinearBase):
                _pack(layer, pieces, scratch)
            else:
                joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                getattr(layer, key).data[: len(joined)] = joined  # a vocabulary may be padded
        self._repack_head()
        return True

    def _repack_head(self) -> None:
        """An output head holds a packed copy, too. Where it is tied to the embeddings, vLLM's reloading leaves the old
        one (vLLM 0.32)."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        model = self.model_runner.get_model()
        vocab_layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
        heads: list[Any] = [layer for layer in vocab_layers if isinstance(layer, ParallelLMHead)]
        embeddings = next(layer for layer in vocab_layers if not isinstance(layer, ParallelLMHead))
        for head in heads:
            if model.config.tie_word_embeddings:
                head.tie_weights(embeddings)
            head.cpu_linear = None
            head.quant_method.process_weights_after_loading(head)


def _pack(layer: Any, pieces: Sequence[torch.Tensor], scratch: dict[torch.Size, torch.Tensor]) -> None:
    """Give a linear layer its new weight. Its old packed copy goes first, so that the new one finds that room: fresh
    pages cost more than the packing. For the same reason layers of one shape join their pieces in the same `scratch`.
    """
    weight = pieces[0]
    if len(pieces) > 1:
        shape = torch.Size((sum(map(len, pieces)), weight.shape[1]))
        weight = torch.cat(list(pieces), out=scratch.setdefault(shape, weight.new_empty(shape)))
    layer.cpu_linear = None
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.quant_method.process_weights_after_loading(layer)
    if layer.weight.numel():  # the layer computes with it as it is
        layer.weight.data = weight.clone()
