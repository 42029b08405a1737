"""Samples rollouts: holds an engine and the version of the weights that it serves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray

from srl_rlvr import records
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.policies.weights import Manifest


@ray.remote(max_restarts=-1, max_task_retries=0, concurrency_groups={"health": 1})
class Generator:
    """A restart runs `__init__` only and serves the base weights: the supervisor then hands over the newest ones."""

    def __init__(self, kind: str, model: str, engine: dict[str, Any], threads: int):
        os.environ["OMP_NUM_THREADS"] = str(threads)
        from srl_rlvr import engines
        from srl_rlvr.policies import base_models

        self.tokenizer = base_models.load_tokenizer(Path(model))
        self.engine = engines.create(kind, Path(model), engine)

    def generate(self, prompts: pa.Table, spec: SamplingSpec) -> pa.Table:
        """Rollout table: `spec.samples` rows for each prompt, in order."""
        records.check("Prompt", prompts)
        groups = self.engine.sample(prompts["token_ids"].to_pylist(), spec)
        rows = [
            {
                "prompt_id": prompt_id,
                "sample_index": index,
                "policy_version": self.engine.version,
                "token_ids": completion.token_ids,
                "logprobs": completion.logprobs,
                "text": self.tokenizer.decode(completion.token_ids, skip_special_tokens=True),
                "finish_reason": completion.finish_reason,
            }
            for prompt_id, group in zip(prompts["id"].to_pylist(), groups, strict=True)
            for index, completion in enumerate(group)
        ]
        return records.build("Rollout", rows)

    def load(self, buffer: np.ndarray, manifest: Manifest) -> tuple[int, str]:
        """Serve these weights; returns the version and checksum that are now served."""
        return manifest.version, self.engine.load(buffer, manifest)

    @ray.method(concurrency_group="health")
    def health(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "rss_gib": psutil.Process().memory_info().rss / 2**30}
