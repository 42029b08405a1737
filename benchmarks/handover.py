"""New weights on their way: from the end of an optimizer step to the first token sampled with them.

    python benchmarks/handover.py            ten hand-overs of either kind in turn
    python benchmarks/handover.py --quick    two of each; transformers engine, a model of 4 million parameters
    python benchmarks/handover.py --engine transformers

SmolLM2-135M-Instruct in fp32: all weights (513 MiB), and adapters of rank 16 (19 MiB). The real actors: a Ray Train
learner, a Generator with the engine, the object store between them. Each hand-over follows a real update, and ends when
a prompt of 8 tokens has been answered with one token by the new version. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _machine import crew, model, prompt_row, tell

RANK = {"full": 0, "adapter": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    options = parser.parse_args()
    import ray

    base, engine = model(options.quick), "transformers" if options.quick else options.engine
    with tempfile.TemporaryDirectory() as folder:
        crews = {kind: crew(f"handover-{kind}", base, engine, rank, Path(folder)) for kind, rank in RANK.items()}
        try:
            found: dict[str, list[dict[str, float]]] = {kind: [] for kind in crews}
            for turn in range((2 if options.quick else 10) + 1):
                for kind, actors in crews.items():
                    measured = _hand_over(actors)
                    if turn:  # the first one makes room that the others find
                        found[kind].append(measured)
        finally:
            for actors in crews.values():
                actors.close()
            ray.shutdown()
    print(f"{'weights':<8} {'seconds':>8} {'hand-over':>10} {'first token':>12}   all")
    for kind, runs in found.items():
        columns = [statistics.median(run[key] for run in runs) for key in ("seconds", "handover", "token")]
        print("{:<8} {:>8.3f} {:>10.3f} {:>12.3f}   ".format(kind, *columns)
              + " ".join(f"{run['seconds']:.2f}" for run in runs))  # fmt: skip
    figures = {f"{kind}_s": round(statistics.median(run["seconds"] for run in runs), 3) for kind, runs in found.items()}
    tell("handover", figures, whole=not options.quick and options.engine == "vllm", engine=engine)


def _hand_over(actors: Any) -> dict[str, float]:
    import ray

    from srl_rlvr import records
    from srl_rlvr.engines import SamplingSpec
    from srl_rlvr.policies.losses import UpdateSpec

    prompt = records.build("Prompt", [prompt_row(0, list(range(100, 108)))])
    sample = {
        "prompt_id": "p", "sample_index": 0, "trunk_id": "p", "policy_version": 0, "prompt_ids": [5, 6, 7],
        "completion_ids": [8, 9, 10], "behavior_logprobs": [-5.0, -5.0, -5.0], "advantage": 1.0,
    }  # fmt: skip
    actors.update(records.build("Sample", [sample]), UpdateSpec("policy_gradient", learning_rate=1e-6))
    began = time.perf_counter()
    actors.hand_over()
    handed_over = time.perf_counter()
    rollouts: Any = ray.get(actors.generators[0].generate.remote(prompt, SamplingSpec(1, 1.0, 1)))
    ended = time.perf_counter()
    assert rollouts["policy_version"].to_pylist() == [actors.dispatcher.weights[1].version]
    return {"seconds": ended - began, "handover": handed_over - began, "token": ended - handed_over}


if __name__ == "__main__":
    main()
