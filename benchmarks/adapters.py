"""What adapters beside the layers cost in sampling: vLLM without any, and with LoRA of rank 16 and 64.

    python benchmarks/adapters.py            five rounds, each of the three once in each: 8 prompts × 8 samples
    python benchmarks/adapters.py --quick    one round of 8 tokens each, with a model of 4 million parameters

The prompts, lengths and settings of `rollout.py`. One engine is given base weights, or adapters, before each sampling;
loading them is not timed (`handover.py` does). Prints a table and one JSON line: rates in parts of that without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from _machine import in_the_actors_environment, model, random_prompts, tell
from rollout import COMPLETION, ENGINE, GROUP, PROMPT, PROMPTS

RANKS = (0, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    in_the_actors_environment(options.quick)
    from srl_rlvr import engines
    from srl_rlvr.engines import SamplingSpec

    folder = model(options.quick)
    prompts = random_prompts(folder, PROMPTS, PROMPT)
    engine = engines.create("vllm", folder, ENGINE)
    exports = {rank: adapted(folder, rank).export() for rank in RANKS}
    length = 8 if options.quick else COMPLETION

    def rate(rank: int) -> float:
        engine.load(*exports[rank])
        began = time.perf_counter()
        groups = engine.sample(prompts, SamplingSpec(GROUP, 1.0, length, seed=1))
        seconds = time.perf_counter() - began
        return sum(len(completion.token_ids) for group in groups for completion in group) / seconds

    rates: dict[int, list[float]] = {rank: [] for rank in RANKS}
    for _ in range((1 if options.quick else 5) + 1):  # the first round warms up
        for rank, of in rates.items():
            of.append(rate(rank))
    medians = {rank: statistics.median(of[1:]) for rank, of in rates.items()}
    print(f"{'rank':<6} {'tokens/s':>9}   all rounds")
    for rank, of in rates.items():
        print(f"{rank:<6} {medians[rank]:>9.0f}   {' '.join(f'{value:.0f}' for value in of[1:])}")
    figures = {f"rank_{rank}_vs_none": round(medians[rank] / medians[0], 3) for rank in RANKS[1:]}
    tell("adapters", figures, whole=not options.quick)


def adapted(folder: Path, rank: int, seed: int = 0) -> Any:
    """The policy of a model with adapters that change what it computes, or without any (rank 0)."""
    import torch

    from srl_rlvr.policies.text import TextPolicy

    policy = TextPolicy(folder, lora_rank=rank, seed=seed)
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    return policy


if __name__ == "__main__":
    main()
