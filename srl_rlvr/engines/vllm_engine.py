"""vLLM inside this process, on CPU or GPU: prefix cache on, a group as one request, weights replaced in place.

In this process, because then all requests of a batch stand in the queue before the first step runs: the order of
computation, and with it every sampled token, depends on nothing but weights, prompts and seed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srl_rlvr.engines import Completion, SamplingSpec, in_segments
from srl_rlvr.errors import MissingExtraError
from srl_rlvr.policies import base_models
from srl_rlvr.policies.weights import Manifest, unflatten

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # One thread team over all cores; binding it would put both of its threads on one.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class WeightReceiver:
    """Mixed into vLLM's worker: `load_weights` fails on a CPU, whose layers hold prepacked copies; reloading works."""

    model_runner: Any

    def receive_weights(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self.model_runner.reload_weights(weights_iterator=iter(tensors))
        if not torch.cuda.is_available():
            self._repack_tied_head()

    def receive_adapters(self, base: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor], scale: float) -> None:
        """Layer by layer, without vLLM's reloading of the whole model: a third of the time."""
        from vllm.model_executor.layers.linear import LinearBase

        model = self.model_runner.get_model()
        fused = getattr(model, "packed_modules_mapping", {})
        layer: Any
        for name, layer in model.named_modules():
            parent, _, last = name.rpartition(".")
            parts = [f"{parent}.{part}.weight" for part in fused.get(last, [last])]
            if not isinstance(layer, LinearBase) or not all(f"{part}.lora_A" in adapters for part in parts):
                continue
            merged = torch.empty(sum(len(base[part]) for part in parts), base[parts[0]].shape[1])
            for part, rows in zip(parts, merged.split([len(base[part]) for part in parts]), strict=True):
                torch.addmm(base[part], adapters[f"{part}.lora_B"], adapters[f"{part}.lora_A"], alpha=scale, out=rows)
            if torch.cuda.is_available():
                parameter: Any = layer.weight
                parameter.data.copy_(merged)  # in place: captured graphs hold its address
            else:
                layer.weight = torch.nn.Parameter(merged, requires_grad=False)
                layer.quant_method.process_weights_after_loading(layer)

    def _repack_tied_head(self) -> None:
        """Reloading leaves an output head that is tied to the embeddings with its old prepacked copy (vLLM 0.32)."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        model = self.model_runner.get_model()
        if not model.config.tie_word_embeddings:
            return
        vocab_layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
        embeddings = next(layer for layer in vocab_layers if not isinstance(layer, ParallelLMHead))
        for head in vocab_layers:
            if isinstance(head, ParallelLMHead):
                head.tie_weights(embeddings)
                head.quant_method.process_weights_after_loading(head)


class VllmEngine:
    def __init__(self, model: Path, *, max_running: int, max_context: int, kv_cache_gib: float, block_size: int):
        if importlib.util.find_spec("vllm") is None:
            raise MissingExtraError("vllm", "gpu" if torch.cuda.is_available() else "cpu")
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        from vllm import LLM

        on_cpu = not torch.cuda.is_available()
        placement: dict[str, Any] = {}
        if on_cpu:
            placement = {"enforce_eager": True, "kv_cache_memory_bytes": int(kv_cache_gib * 2**30)}
        self.model = model
        self.max_context = max_context
        self.version = 0
        # Of the layers that have adapters; None while the other layers may hold more than the base model.
        self._base: dict[str, torch.Tensor] | None = None
        self.engine = LLM(
            str(model),
            dtype="float32" if on_cpu else "bfloat16",
            max_model_len=max_context,
            max_num_seqs=max_running,
            enable_prefix_caching=True,
            block_size=block_size,
            # Divided by the temperature, as the learner computes them.
            logprobs_mode="processed_logprobs",
            worker_extension_cls=f"{__name__}.WeightReceiver",
            disable_log_stats=True,
            seed=0,
            **placement,
        )

    def sample(self, prompts: list[list[int]], spec: SamplingSpec) -> list[list[Completion]]:
        # vLLM's own per-request generators do not work with chunked prefill on a CPU; the process's generator does.
        torch.manual_seed(spec.seed)

        def one_segment(prompts: list[list[int]], samples: list[int], max_tokens: list[int], stop: str) -> Any:
            if not prompts:
                return []
            from vllm import SamplingParams

            requests = [
                SamplingParams(
                    n=n,
                    temperature=spec.temperature,
                    max_tokens=length,
                    logprobs=0,
                    stop=[stop] if stop else None,
                    include_stop_str_in_output=True,
                    detokenize=bool(stop),
                )
                for n, length in zip(samples, max_tokens, strict=True)
            ]
            outputs = self.engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts], requests, use_tqdm=False
            )
            return [_group(output) for output in outputs]

        return in_segments(one_segment, prompts, spec, self.max_context)

    def load(self, buffer: np.ndarray | torch.Tensor, manifest: Manifest) -> str:
        """See `Engine`. Adapters are merged into the layers that they belong to; the others stay as they are."""
        tensors = dict(unflatten(buffer, manifest))
        if manifest.lora_scale is None:
            self.engine.collective_rpc("receive_weights", args=(list(tensors.items()),))
            self._base = None
        else:
            if self._base is None:
                parameters = [(name, p.detach()) for name, p in base_models.load_model(self.model).named_parameters()]
                self.engine.collective_rpc("receive_weights", args=(parameters,))
                adapted = {name.rpartition(".lora_")[0] for name in tensors}
                self._base = {name: parameter for name, parameter in parameters if name in adapted}
            self.engine.collective_rpc("receive_adapters", args=(self._base, tensors, manifest.lora_scale))
        self.engine.reset_prefix_cache()
        self.version = manifest.version
        return manifest.checksum


def _group(output: Any) -> tuple[list[Completion], list[bool]]:
    completions, by_stop = [], []
    for sample in sorted(output.outputs, key=lambda sample: sample.index):
        ids = list(sample.token_ids)
        logprobs = [entry[token].logprob for entry, token in zip(sample.logprobs, ids, strict=True)]
        completions.append(Completion(ids, logprobs, sample.finish_reason))
        by_stop.append(isinstance(sample.stop_reason, str))
    return completions, by_stop
