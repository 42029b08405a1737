"""What the engines and the learner do on this machine, measured: `srl-rlvr doctor --measure`.

Each runs in a process of its own, with the threads and the allocator that the actors of a run get: sampling alone and
learning alone on all cores, as they take turns, then both at once on half of the cores each, as they overlap.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MODEL = "smollm2-135m-instruct"
_PROMPTS, _GROUP, _PROMPT_TOKENS, _TOKENS = 8, 8, 64, 32
_LEARNED = 2  # of the prompts, in one update: an update of all takes several windows
_WINDOW_S = 10.0


@dataclass(frozen=True)
class Measured:
    """Rates in tokens per second. `turns` and `overlap` are those of sampling and learning the same tokens."""

    sampling: dict[str, float]  # of each engine, on all cores
    learning: float
    sampling_on_half: float  # of the faster engine, while the learner learns on the other half
    learning_on_half: float

    @property
    def engine(self) -> str:
        return max(self.sampling, key=lambda kind: self.sampling[kind])

    @property
    def turns(self) -> float:
        return 1 / (1 / self.sampling[self.engine] + 1 / self.learning)

    @property
    def overlap(self) -> float:
        return min(self.sampling_on_half, self.learning_on_half)


def measure() -> Measured:
    """Two or three minutes on two cores. Raises RuntimeError with the last line of a process that ended early."""
    cores = len(os.sched_getaffinity(0))
    kinds = ["transformers", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
    sampling = {kind: _together([(kind, cores)])[0] for kind in kinds}
    learning = _together([("learn", cores)])[0]
    half = max(1, cores // 2)
    fastest = max(sampling, key=lambda kind: sampling[kind])
    both = _together([(fastest, half), ("learn", half)])
    return Measured(sampling, learning, *both)


def _together(tasks: list[tuple[str, int]]) -> list[float]:
    """Rates of (what, threads) that run at the same time, begun when all are ready."""
    from actors.cluster import worker_environment

    processes = []
    for what, threads in tasks:
        environment = os.environ | worker_environment(0, threads)["env_vars"]
        command = [sys.executable, "-m", "srl_rlvr.cli.measure", what]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        for process in processes:
            _answer(process)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [_answer(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _answer(process: subprocess.Popen[str]) -> float:
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith("@"):
            return json.loads(line[1:])
    lines = process.stderr.read().strip().splitlines()
    raise RuntimeError(lines[-1] if lines else "it ended without a word")


def _child(what: str) -> None:
    """Warm up, say so, wait; then count tokens for the length of the window, and say the rate."""
    from srl_rlvr.cli.session import model_cache
    from srl_rlvr.policies import base_models

    model = base_models.resolve(_MODEL, model_cache())
    once = _learner(model) if what == "learn" else _sampler(what, model)
    once()
    print("@0", flush=True)
    sys.stdin.readline()
    began, tokens = time.perf_counter(), 0
    while time.perf_counter() - began < _WINDOW_S:
        tokens += once()
    print(f"@{tokens / (time.perf_counter() - began)}", flush=True)


def _prompts() -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(10, 40_000, (_PROMPTS, _PROMPT_TOKENS)).tolist()


def _sampler(kind: str, model: Path) -> Any:
    from srl_rlvr import engines
    from srl_rlvr.config import EngineConfig
    from srl_rlvr.engines import SamplingSpec

    defaults = EngineConfig()
    engine = engines.create(
        kind,
        model,
        {
            "max_running": _PROMPTS * _GROUP,
            "max_context": 256,
            "kv_cache_gib": defaults.kv_cache_gib,
            "block_size": defaults.block_size,
        },
    )

    def sample() -> int:
        groups = engine.sample(_prompts(), SamplingSpec(_GROUP, 1.0, _TOKENS))
        return sum(len(completion.token_ids) for group in groups for completion in group)

    return sample


def _learner(model: Path) -> Any:
    from srl_rlvr import records
    from srl_rlvr.config import LearnerConfig
    from srl_rlvr.policies.losses import UpdateSpec
    from srl_rlvr.policies.text import TextPolicy

    defaults = LearnerConfig()
    policy = TextPolicy(
        model,
        tokens_per_microbatch=defaults.tokens_per_microbatch,
        activation_checkpointing=defaults.activation_checkpointing,
    )
    rows = [
        {
            "prompt_id": str(p), "sample_index": i, "trunk_id": str(p), "policy_version": 0, "prompt_ids": prompt,
            "completion_ids": prompt[:_TOKENS], "behavior_logprobs": [-9.0] * _TOKENS, "advantage": i % 2 - 0.5,
        }
        for p, prompt in enumerate(_prompts()[:_LEARNED])
        for i in range(_GROUP)
    ]  # fmt: skip

    def update() -> int:
        policy.update(records.build("Sample", rows), UpdateSpec("policy_gradient", learning_rate=1e-9))
        return len(rows) * _TOKENS

    return update


if __name__ == "__main__":
    _child(sys.argv[1])
