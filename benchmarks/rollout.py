"""Sampling: our Generator actor, the bare engine it wraps (either kind), `model.generate`, and the roof of them all.

    python benchmarks/rollout.py            five rounds, every side once in each: 8 prompts × 8 samples
    python benchmarks/rollout.py --quick    one round, 16 tokens each

Prompts of 100 random tokens, completions of up to 64, SmolLM2-135M-Instruct in fp32, temperature 1, 64 sequences at
once. The roof is the rate of the model's own matrix products at 64 rows, layer by layer with the real weights, and
nothing else: no attention, no norms, no prompts, no sampling. All sides run on the same number of threads, at Ray's
niceness, with the allocator that our actors get. The first three figures are those of vLLM, the default.
Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _machine import commit, in_the_actors_environment, machine, prompt_row

MODEL = "smollm2-135m-instruct"
PROMPTS, GROUP, PROMPT, COMPLETION = 8, 8, 100, 64
ENGINE = {"max_running": PROMPTS * GROUP, "max_context": 256, "kv_cache_gib": 1.0, "block_size": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    in_the_actors_environment()
    import numpy as np

    from srl_rlvr.cli.session import model_cache
    from srl_rlvr.policies import base_models

    folder = base_models.resolve(MODEL, model_cache())
    rng = np.random.default_rng(0)
    prompts = rng.integers(10, 40_000, (PROMPTS, PROMPT)).tolist()
    sides: dict[str, Callable[[int], tuple[int, float]]] = {
        "roof": _roof(folder),
        "generate": _generate(folder, prompts),
        "vllm": _engine("vllm", folder, prompts),
        "vllm actor": _actor("vllm", folder, prompts),
        "ours": _engine("transformers", folder, prompts),
        "ours actor": _actor("transformers", folder, prompts),
    }
    length = 16 if options.quick else COMPLETION
    for side in sides.values():
        side(4)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 if options.quick else 5):
        for name, side in sides.items():
            tokens, seconds = side(length)
            rates[name].append(tokens / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{'side':<12} {'tokens/s':>9}   all rounds")
    for name, values in rates.items():
        print(f"{name:<12} {medians[name]:>9.0f}   {' '.join(f'{value:.0f}' for value in values)}")
    figures = {
        "actor_vs_engine": round(medians["vllm actor"] / medians["vllm"], 3),
        "vs_generate": round(medians["vllm actor"] / medians["generate"], 2),
        "of_gemm_bound": round(medians["vllm actor"] / medians["roof"], 2),
        "ours_actor_vs_engine": round(medians["ours actor"] / medians["ours"], 3),
        "ours_vs_generate": round(medians["ours actor"] / medians["generate"], 2),
        "ours_of_gemm_bound": round(medians["ours actor"] / medians["roof"], 2),
    }
    print(json.dumps({"benchmark": "rollout", "figures": figures, "machine": machine(), "commit": commit()}))


def _timed(sample: Callable[[], int]) -> tuple[int, float]:
    began = time.perf_counter()
    tokens = sample()
    return tokens, time.perf_counter() - began


def _roof(folder: Path) -> Callable[[int], tuple[int, float]]:
    import torch
    import torch.nn.functional as F

    from srl_rlvr.policies import base_models

    network = base_models.load_model(folder)
    weights = [m.weight.detach() for m in network.modules() if isinstance(m, torch.nn.Linear)]  # the head is one
    rows = {width: torch.randn(PROMPTS * GROUP, width) for width in {weight.shape[1] for weight in weights}}

    @torch.inference_mode()
    def products(length: int) -> tuple[int, float]:
        def all_steps() -> int:
            for _ in range(length):
                for weight in weights:
                    F.linear(rows[weight.shape[1]], weight)
            return length * PROMPTS * GROUP

        return _timed(all_steps)

    return products


def _generate(folder: Path, prompts: list[list[int]]) -> Callable[[int], tuple[int, float]]:
    import torch

    from srl_rlvr.policies import base_models

    network = base_models.load_model(folder)
    ids = torch.tensor(prompts)

    def sample(length: int) -> tuple[int, float]:
        def generate() -> int:
            found = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                num_return_sequences=GROUP,
                max_new_tokens=length,
                min_new_tokens=length,
            )
            return found[:, ids.shape[1] :].numel()

        return _timed(generate)

    return sample


def _engine(kind: str, folder: Path, prompts: list[list[int]]) -> Callable[[int], tuple[int, float]]:
    from srl_rlvr import engines
    from srl_rlvr.engines import SamplingSpec

    engine = engines.create(kind, folder, ENGINE)

    def sample(length: int) -> tuple[int, float]:
        def groups() -> int:
            found = engine.sample(prompts, SamplingSpec(GROUP, 1.0, length, seed=1))
            return sum(len(completion.token_ids) for group in found for completion in group)

        return _timed(groups)

    return sample


def _actor(kind: str, folder: Path, prompts: list[list[int]]) -> Callable[[int], tuple[int, float]]:
    import ray

    from actors.cluster import worker_environment
    from actors.generator import Generator
    from srl_rlvr import records
    from srl_rlvr.engines import SamplingSpec

    if not ray.is_initialized():
        ray.init(address="local", log_to_driver=False, include_dashboard=False)
    environment = worker_environment(0, os.cpu_count() or 1)
    actor: Any = Generator.options(num_cpus=0, runtime_env=environment).remote(kind, str(folder), ENGINE)  # type: ignore[attr-defined]
    ray.get(actor.health.remote())
    table = records.build("Prompt", [prompt_row(i, ids) for i, ids in enumerate(prompts)])

    def sample(length: int) -> tuple[int, float]:
        def rollouts() -> int:
            found: Any = ray.get(actor.generate.remote(table, SamplingSpec(GROUP, 1.0, length, seed=1)))
            return len(found["token_ids"].combine_chunks().flatten())

        return _timed(rollouts)

    return sample


if __name__ == "__main__":
    main()
