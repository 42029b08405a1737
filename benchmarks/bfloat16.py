"""Sampling and learning with `model.matmul = "bfloat16"` against float32, with LoRA of rank 16.

    python benchmarks/bfloat16.py            five rounds, each side once in each: 8 prompts × 8 samples
    python benchmarks/bfloat16.py --quick    one round of 8 tokens each, with a model of 4 million parameters
    python benchmarks/bfloat16.py --rounds 1 --threads 1    of so many rounds and threads

The transformers engine and the learner with SmolLM2-135M-Instruct, the prompts and lengths of `rollout.py`; the learner
learns from what was sampled. Prints a table and one JSON line: ratios of medians, and the largest difference between
the log-probabilities that learner and engine find for the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from _machine import in_the_actors_environment, model, random_prompts, tell
from rollout import COMPLETION, ENGINE, GROUP, PROMPT, PROMPTS

KINDS: tuple[str, ...] = ("float32", "bfloat16")
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    in_the_actors_environment(options.quick)
    import numpy as np
    import torch

    from srl_rlvr import engines, records
    from srl_rlvr.engines import SamplingSpec
    from srl_rlvr.policies.losses import UpdateSpec
    from srl_rlvr.policies.text import TextPolicy

    if options.threads:
        torch.set_num_threads(options.threads)
    folder = model(options.quick)
    prompts = random_prompts(folder, PROMPTS, PROMPT)
    spec = SamplingSpec(GROUP, 1.0, 8 if options.quick else COMPLETION, seed=1)
    sides = {
        kind: (
            engines.create("transformers", folder, ENGINE | {"matmul": kind}),
            TextPolicy(folder, lora_rank=16, matmul=kind),
        )
        for kind in KINDS
    }
    rates: dict[tuple[str, str], list[float]] = {(what, kind): [] for what in ("sample", "learn") for kind in KINDS}
    apart = dict.fromkeys(KINDS, 0.0)
    for turn in range((1 if options.quick else options.rounds) + 1):  # the first round warms up
        for kind, (engine, policy) in sides.items():
            began = time.perf_counter()
            groups = engine.sample(prompts, spec)
            tokens = sum(len(completion.token_ids) for group in groups for completion in group)
            rates["sample", kind].append(tokens / (time.perf_counter() - began))
            table = records.build("Sample", list(_rows(prompts, groups)))
            if not turn:
                found = zip(policy.logprobs(table), table["behavior_logprobs"].to_pylist(), strict=True)
                apart[kind] = max(float(np.abs(ours - theirs).max()) for ours, theirs in found)
            began = time.perf_counter()
            policy.update(table, UpdateSpec("policy_gradient", learning_rate=0.0))
            rates["learn", kind].append(tokens / (time.perf_counter() - began))
    medians = {key: statistics.median(of[1:]) for key, of in rates.items()}
    print(f"{'':<8}{'':<10}{'tokens/s':>9}   all rounds")
    for (what, kind), of in rates.items():
        print(f"{what:<8}{kind:<10}{medians[what, kind]:>9.0f}   {' '.join(f'{value:.0f}' for value in of[1:])}")
    figures: dict[str, float] = {
        f"{what}_vs_float32": round(medians[what, "bfloat16"] / medians[what, "float32"], 2)
        for what in ("sample", "learn")
    }
    figures |= {f"{kind}_apart": round(value, 5) for kind, value in apart.items()}
    tell("bfloat16", figures, whole=not (options.quick or options.threads or options.rounds < ROUNDS))


def _rows(prompts: list[list[int]], groups: Any) -> Any:
    for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        for index, completion in enumerate(group):
            yield {
                "prompt_id": str(number), "sample_index": index, "trunk_id": str(number), "policy_version": 0,
                "prompt_ids": prompt, "completion_ids": completion.token_ids,
                "behavior_logprobs": completion.logprobs, "advantage": index % 2 - 0.5,
            }  # fmt: skip


if __name__ == "__main__":
    main()
