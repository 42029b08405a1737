"""Sampling: our Generator actor, the bare engine it wraps (either kind), `model.generate`, and the roof of them all.

    python benchmarks/rollout.py            five rounds, every side once in each: 8 prompts × 8 samples
    python benchmarks/rollout.py --quick    one round of 8 tokens each, with a model of 4 million parameters

Prompts of 100 random tokens, completions of up to 64, SmolLM2-135M-Instruct in fp32, temperature 1, 64 sequences at
once. A roof is the rate of the model's own matrix products at 64 rows, layer by layer with the real weights, and
nothing else: no attention, no norms, no prompts, no sampling. The products are measured as torch computes them and by
oneDNN with packed weights, both in float32 and bfloat16; `roof` names the fastest and `float32_roof` the fastest in
float32, in which the engines compute. A roof is the best of its rounds. All sides run on the same number of threads, at
Ray's niceness, with the allocator that our actors get. The first four figures are those of vLLM, the default.
Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _machine import actors_environment, in_the_actors_environment, model, prompt_row, random_prompts, tell

PROMPTS, GROUP, PROMPT, COMPLETION = 8, 8, 100, 64
ENGINE = {"max_running": PROMPTS * GROUP, "max_context": 256, "kv_cache_gib": 1.0, "block_size": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    in_the_actors_environment(options.quick)
    folder = model(options.quick)
    prompts = random_prompts(folder, PROMPTS, PROMPT)
    roofs = _roofs(folder)
    sides: dict[str, Callable[[int], tuple[int, float]]] = {
        **roofs,
        "generate": _generate(folder, prompts),
        "vllm": _engine("vllm", folder, prompts),
        "vllm actor": _actor("vllm", folder, prompts, options.quick),
        "ours": _engine("transformers", folder, prompts),
        "ours actor": _actor("transformers", folder, prompts, options.quick),
    }
    length = 8 if options.quick else COMPLETION
    for side in sides.values():
        side(4)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 if options.quick else 5):
        for name, side in sides.items():
            tokens, seconds = side(length)
            rates[name].append(tokens / seconds)
    rate = {name: max(of) if name in roofs else statistics.median(of) for name, of in rates.items()}
    print(f"{'side':<18} {'tokens/s':>9}   all rounds")
    for name, of in rates.items():
        print(f"{name:<18} {rate[name]:>9.0f}   {' '.join(f'{value:.0f}' for value in of)}")
    roof = max(roofs, key=lambda name: rate[name])
    float32_roof = max((name for name in roofs if "float32" in name), key=lambda name: rate[name])
    figures: dict[str, float | str] = {}
    for prefix, engine in (("", "vllm"), ("ours_", "ours")):
        actor = rate[f"{engine} actor"]
        figures |= {
            f"{prefix}actor_vs_engine": round(actor / rate[engine], 3),
            f"{prefix}vs_generate": round(actor / rate["generate"], 2),
            f"{prefix}of_gemm_bound": round(actor / rate[roof], 2),
            f"{prefix}of_float32_bound": round(actor / rate[float32_roof], 2),
        }
    tell("rollout", figures | {"roof": roof, "float32_roof": float32_roof}, whole=not options.quick)


def _timed(sample: Callable[[], int]) -> tuple[int, float]:
    began = time.perf_counter()
    tokens = sample()
    return tokens, time.perf_counter() - began


def _roofs(folder: Path) -> dict[str, Callable[[int], tuple[int, float]]]:
    """By name, every way to compute the model's matrix products that this machine has."""
    import torch
    import torch.nn.functional as F

    from srl_rlvr.policies import base_models

    network = base_models.load_model(folder)
    found = [m.weight.detach() for m in network.modules() if isinstance(m, torch.nn.Linear)]  # the head is one
    rows = PROMPTS * GROUP
    onednn = torch.ops.mkldnn

    def side(products: list[tuple[Callable[..., Any], Any, Any]]) -> Callable[[int], tuple[int, float]]:
        @torch.inference_mode()
        def steps(length: int) -> tuple[int, float]:
            def all_steps() -> int:
                for _ in range(length):
                    for product, given, weight in products:
                        product(given, weight)
                return length * rows

            return _timed(all_steps)

        return steps

    def packed(given: Any, weight: Any) -> Any:
        return onednn._linear_pointwise(given, weight, None, "none", [], "")

    roofs = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        given = {width: torch.randn(rows, width, dtype=dtype) for width in {weight.shape[1] for weight in found}}
        weights = [weight.to(dtype) for weight in found]
        roofs[f"torch {name}"] = side([(F.linear, given[weight.shape[1]], weight) for weight in weights])
        if dtype == torch.float32 or onednn._is_mkldnn_bf16_supported():
            roofs[f"oneDNN {name}"] = side(
                [(packed, given[w.shape[1]], onednn._reorder_linear_weight(w, rows)) for w in weights]
            )
    return roofs


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


def _actor(kind: str, folder: Path, prompts: list[list[int]], quick: bool) -> Callable[[int], tuple[int, float]]:
    import ray

    from actors.generator import Generator
    from srl_rlvr import records
    from srl_rlvr.engines import SamplingSpec

    if not ray.is_initialized():
        ray.init(address="local", log_to_driver=False, include_dashboard=False)
    actor: Any = Generator.options(num_cpus=0, runtime_env=actors_environment(quick)).remote(  # type: ignore[attr-defined]
        kind, str(folder), ENGINE, "task_llm", ENGINE["max_context"]
    )
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
