"""What actors hand to each other: Arrow Tables through the object store against pickled Python lists.

    python benchmarks/exchange.py            five real training steps, five rounds of either side
    python benchmarks/exchange.py --quick    one of each; transformers engine, a model of 4 million parameters

`share_of_step`: the tables of one real RLVR step (prompts, rollouts, verdicts, samples: 8 problems × 8 samples of up to
64 tokens, SmolLM2-135M-Instruct, real actors), put into the object store and read again, in parts of the time that the
step took. `vs_pickle`: a batch of 8,192 rollouts of 64 tokens, handed to another process and added up there, as a Table
and as pickled lists. Zero-copy is shown by the reader: its columns lie in the store's own shared memory, and reading
them allocates nothing. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from _machine import crew, model, prompt_row, random_prompts, tell

PROMPTS, GROUP, COMPLETION, LARGE = 8, 8, 64, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    rounds = 1 if options.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        base = model(options.quick)
        actors = crew("exchange", base, "transformers" if options.quick else "vllm", 0, Path(folder))
        try:
            reader = Reader.remote()
            prompts, tokens = random_prompts(base, PROMPTS, 100), 4 if options.quick else COMPLETION
            steps = [_step(actors, reader, prompts, tokens) for _ in range(rounds + 1)][1:]
            table, lists = _large_batch()
            reader_sees: dict[str, Any] = ray.get(reader.look_at.remote(table))  # type: ignore[attr-defined]
            sides = {"arrow": table, "pickle": lists}
            hand_over: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(rounds + 1):
                for name, batch in sides.items():
                    hand_over[name].append(_seconds(lambda batch=batch: ray.get(reader.add_up.remote(ray.put(batch)))))  # type: ignore[attr-defined]
        finally:
            actors.close()
            ray.shutdown()
    arrow, pickled = (statistics.median(values[1:]) for values in hand_over.values())
    step_s, tables_s = (statistics.median(step[i] for step in steps) for i in (0, 1))
    print(f"step {step_s:.2f} s, its tables {1000 * tables_s:.1f} ms ({steps[0][2] / 1024:.0f} KiB)")
    print(f"{LARGE} rollouts: arrow {1000 * arrow:.0f} ms, pickled lists {1000 * pickled:.0f} ms")
    print(f"reader: {reader_sees}")
    figures = {
        "share_of_step": round(tables_s / step_s, 5),
        "vs_pickle": round(pickled / arrow, 1),
        "zero_copy": reader_sees["buffers_in_shared_memory"] == reader_sees["buffers"]
        and reader_sees["bytes_allocated"] == 0,
    }
    tell("exchange", figures, whole=not options.quick)


@ray.remote(num_cpus=0)
class Reader:
    def add_up(self, batch: Any) -> float:
        """The sum of all token ids: every token is read."""
        if isinstance(batch, pa.Table):
            return int(batch["token_ids"].combine_chunks().flatten().to_numpy().sum())
        return sum(sum(row["token_ids"]) for row in batch)

    def look_at(self, batch: pa.Table) -> dict[str, int]:
        """Where the columns lie. `batch` is what Ray hands out for a reference, as every actor gets it."""
        before = pa.total_allocated_bytes()
        spans = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "/dev/shm/" in line or "plasma" in line:
                spans.append([int(end, 16) for end in line.split()[0].split("-")])
        buffers = [b for c in batch.columns for chunk in c.chunks for b in chunk.buffers() if b is not None and b.size]
        inside = sum(any(start <= b.address < end for start, end in spans) for b in buffers)
        return {
            "buffers": len(buffers),
            "buffers_in_shared_memory": inside,
            "bytes": sum(b.size for b in buffers),
            "bytes_allocated": pa.total_allocated_bytes() - before,
        }


def _step(actors: Any, reader: Any, asked: list[list[int]], tokens: int) -> tuple[float, float, int]:
    """(seconds of one step, seconds to put its tables and read them elsewhere, their bytes)."""
    from srl_rlvr import records
    from srl_rlvr.engines import SamplingSpec
    from srl_rlvr.policies.losses import UpdateSpec

    prompts = records.build("Prompt", [prompt_row(i, ids) for i, ids in enumerate(asked)])
    began = time.perf_counter()
    rollouts, verdicts, _ = actors.sample(prompts, SamplingSpec(GROUP, 1.0, tokens))
    samples = records.build("Sample", [
        {
            "prompt_id": row["prompt_id"], "sample_index": row["sample_index"], "trunk_id": row["prompt_id"],
            "policy_version": row["policy_version"], "completion_ids": row["token_ids"],
            "prompt_ids": prompts["token_ids"][i // GROUP].as_py(), "behavior_logprobs": row["logprobs"],
            "advantage": float(i % 2) - 0.5,
        }
        for i, row in enumerate(rollouts.to_pylist())
    ])  # fmt: skip
    actors.update(samples, UpdateSpec("policy_gradient", learning_rate=1e-6))
    actors.hand_over()
    step_s = time.perf_counter() - began
    tables = [prompts, rollouts, verdicts, samples]
    tables_s = sum(_seconds(lambda t=t: ray.get(reader.look_at.remote(ray.put(t)))) for t in tables)
    return step_s, tables_s, sum(table.nbytes for table in tables)


def _large_batch() -> tuple[pa.Table, list[dict[str, Any]]]:
    import numpy as np

    from srl_rlvr import records

    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt_id": f"p{i}", "sample_index": i % GROUP, "policy_version": 0, "text": "x" * COMPLETION,
            "token_ids": rng.integers(0, 49_000, COMPLETION).tolist(),
            "logprobs": rng.normal(size=COMPLETION).tolist(), "finish_reason": "stop",
        }
        for i in range(LARGE)
    ]  # fmt: skip
    return records.build("Rollout", rows), rows


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
