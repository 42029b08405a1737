"""Scores rollouts: holds a pool of killable processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray

from srl_rlvr.verifiers.pool import VerifierPool


# Ray's stubs do not know concurrency groups.
@ray.remote(  # type: ignore[reportCallIssue]
    max_restarts=-1, max_task_retries=3, concurrency_groups={"health": 1}
)
class Verifier:
    """A verdict depends on its rollout alone, so a call that was lost is simply made again."""

    def __init__(self, workers: int, deadline_s: float, own: Sequence[str] = ()):
        self.pool = VerifierPool(workers, deadline_s, own)

    def score(self, prompts: pa.Table, rollouts: pa.Table) -> pa.Table:
        """Verdict table, one row for each rollout, in order."""
        return self.pool.score(prompts, rollouts)

    @ray.method(concurrency_group="health")
    def health(self) -> dict[str, Any]:
        return {"pid": os.getpid(), **self.pool.health()}
