"""vLLM inside this process, on CPU or GPU: prefix cache on, a group as one request, weights replaced in place.

In this process, because then all requests of a batch stand in the queue before the first step runs: the order of
computation, and with it every sampled token, depends on nothing but weights, prompts and seed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srl_rlvr.engines import Completion, SamplingSpec, in_segments, start_advice
from srl_rlvr.errors import InputError, MissingExtraError
from srl_rlvr.policies import base_models
from srl_rlvr.policies.weights import Manifest, unflatten

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # One thread team over all cores; binding it would put both of its threads on one.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class VllmEngine:
    def __init__(
        self,
        model: Path,
        *,
        max_running: int,
        max_context: int,
        kv_cache_gib: float,
        block_size: int,
        gpu_memory_utilization: float = 0.9,
    ):
        if importlib.util.find_spec("vllm") is None:
            raise MissingExtraError("vllm", "gpu" if torch.cuda.is_available() else "cpu")
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        from vllm import LLM

        self._on_cpu = not torch.cuda.is_available()
        placement: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization}
        if self._on_cpu:
            placement = {"enforce_eager": True, "kv_cache_memory_bytes": int(kv_cache_gib * 2**30)}
        self.model = model
        self.max_context = max_context
        self.version = 0
        self._holds_base = True  # and not the full weights of a learner
        self._base: dict[str, torch.Tensor] | None = None  # what adapters are merged into on a GPU
        try:
            self.engine = LLM(
                str(model),
                dtype="float32" if self._on_cpu else "bfloat16",
                max_model_len=max_context,
                max_num_seqs=max_running,
                enable_prefix_caching=True,
                block_size=block_size,
                # Divided by the temperature, as the learner computes them.
                logprobs_mode="processed_logprobs",
                worker_extension_cls="srl_rlvr.engines.vllm_weights.WeightReceiver",
                disable_log_stats=True,
                seed=0,
                **placement,
            )
        except Exception as error:  # it raises nearly anything if the model or the room is not what it should be
            cause = start_advice(f"{type(error).__name__}: {error}")
            raise InputError(f"the vLLM engine does not start with {model}: {cause[:400]}") from error

    def sample(
        self, prompts: list[list[int]], spec: SamplingSpec, images: Sequence[Sequence[bytes]] = ()
    ) -> list[list[Completion]]:
        if images:
            raise InputError("the vllm engine is given no images; use the transformers engine")
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
        """See `Engine`. Adapters come on top of the base weights, which an engine with full ones takes back first."""
        tensors = dict(unflatten(buffer, manifest))
        if manifest.lora_scale is None:
            self.engine.collective_rpc("receive_weights", args=(list(tensors.items()),))
            self._holds_base = False
        else:
            if not self._holds_base:
                self.engine.collective_rpc("receive_weights", args=(self._load_base(),))
                self._holds_base = True
            if self._on_cpu:
                self.engine.collective_rpc("receive_adapters", args=(tensors, manifest.lora_scale))
            else:
                if self._base is None:
                    adapted = {name.rpartition(".lora_")[0] for name in tensors}
                    self._base = {name: tensor for name, tensor in self._load_base() if name in adapted}
                self.engine.collective_rpc("merge_adapters", args=(self._base, tensors, manifest.lora_scale))
        self.engine.reset_prefix_cache()
        self.version = manifest.version
        return manifest.checksum

    def _load_base(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, p.detach()) for name, p in base_models.load_model(self.model).named_parameters()]


def _group(output: Any) -> tuple[list[Completion], list[bool]]:
    completions, by_stop = [], []
    for sample in sorted(output.outputs, key=lambda sample: sample.index):
        ids = list(sample.token_ids)
        logprobs = [entry[token].logprob for entry, token in zip(sample.logprobs, ids, strict=True)]
        completions.append(Completion(ids, logprobs, sample.finish_reason))
        by_stop.append(isinstance(sample.stop_reason, str))
    return completions, by_stop
