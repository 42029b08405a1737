"""Samples rollouts: holds an engine and the version of the weights that it serves."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
import torch

from srl_rlvr import engines, model_types, records
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.policies import base_models
from srl_rlvr.policies.weights import Manifest


# Ray's stubs do not know concurrency groups.
@ray.remote(  # type: ignore[reportCallIssue]
    max_restarts=-1, max_task_retries=0, concurrency_groups={"health": 1}
)
class Generator:
    """A restart runs `__init__` only and serves the base weights: the supervisor then hands over the newest ones.

    `model` is a name or a whole path, which may lie elsewhere on each node.
    """

    def __init__(self, kind: str, model: str, engine: dict[str, Any], model_type: str, max_context: int):
        folder = base_models.on_this_node(model)
        self.tokenizer = model_types.find(model_type).load_tokenizer(folder, max_context)
        # Ray runs `__init__` and the methods in different threads. An engine that computes in both has two OpenMP
        # teams, more threads than cores, and libgomp then puts threads to sleep at every barrier: a tenth of the rate.
        self.thread = ThreadPoolExecutor(1)
        self.engine = self.thread.submit(engines.create, kind, folder, engine).result()

    def generate(self, prompts: pa.Table, spec: SamplingSpec) -> pa.Table:
        """Rollout table: `spec.samples` rows for each prompt, in order."""
        records.check("Prompt", prompts)
        asked = prompts["token_ids"].to_pylist()
        groups = self.thread.submit(self.engine.sample, asked, spec, engines.images_of(prompts)).result()
        return engines.rollout_table(prompts, groups, self.engine.version, self.tokenizer)

    def load(self, buffer: np.ndarray | torch.Tensor, manifest: Manifest) -> tuple[int, str]:
        """Serve these weights; returns the version and checksum that are now served."""
        return manifest.version, self.thread.submit(self.engine.load, buffer, manifest).result()

    @ray.method(concurrency_group="health")
    def health(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "rss_gib": psutil.Process().memory_info().rss / 2**30}
