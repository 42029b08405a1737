"""Does it pay to sample while the learner updates? In turn on all cores against overlapped on cores that are divided.

    python benchmarks/overlap.py            three runs of either side in turn
    python benchmarks/overlap.py --quick    one of each, fewer steps, with a model of 4 million parameters

`srl-rlvr train` of SmolLM2-135M-Instruct, RLVR on generated sums, one generator and one learner worker, 4 × 8 samples a
step. In turn each side has all cores, overlapped (max_staleness = 1) each has half of them: this is what
`scheduling.plan` goes by. A reward that always varies (below) makes every group count, so that both sides do the same
work. The rate leaves out the first two steps. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from _machine import MODEL, SMALL, tell

from srl_rlvr.examples import generated
from srl_rlvr.verifiers import Score

RUN = """
name = "overlap"
checkpoint_every = 1000
[model]
base = "{base}"
max_context = 256
[engine]
kind = "{engine}"
[[data]]
path = "problems.jsonl"
held_out = 1
[[stages]]
kind = "rlvr"
steps = {steps}
prompts_per_step = 4
max_tokens = 48
max_refills = 0
learning_rate = 1e-6
[evaluation]
max_tokens = 1
on_stages = false
[tracking]
mlflow = false
rollouts_per_step = 0
"""
ENGINE = "transformers"
CORES = os.cpu_count() or 1
SIDES = {
    "in turn": ["max_staleness=0"],
    "overlapped": ["max_staleness=1", f"engine.threads={CORES // 2}", f"learner.threads={CORES - CORES // 2}"],
}


def letters(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """The reward of these runs: the share of letters."""
    return Score("scored", sum(character.isalpha() for character in text) / max(1, len(text)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default=ENGINE)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    print(f"{'side':<10}  samples/s  median step: sample, update in seconds")
    for _ in range(1 if options.quick else 3):
        for side, overrides in SIDES.items():
            rates[side].append(measure(side, overrides, options.engine, options.quick))
    medians = {side: statistics.median(of) for side, of in rates.items()}
    figures = {
        "overlapped_vs_in_turn": round(medians["overlapped"] / medians["in turn"], 2),
        **{f"samples_per_s_{side.replace(' ', '_')}": round(rate, 3) for side, rate in medians.items()},
    }
    tell("overlap", figures, whole=not options.quick and options.engine == ENGINE)


def measure(side: str, overrides: list[str], engine: str, quick: bool) -> float:
    """Samples a second, from the end of the second step to the end of the last."""
    with tempfile.TemporaryDirectory() as folder:
        run_file = Path(folder) / "run.toml"
        run_file.write_text(RUN.format(base=SMALL if quick else MODEL, engine=engine, steps=4 if quick else 10))
        problems = [
            json.dumps({"question": row["prompt"], "answer": row["reference"], "verifier": "overlap:letters"})
            for row in generated.generate("sums", 65, seed=0).to_pylist()
        ]
        (Path(folder) / "problems.jsonl").write_text("\n".join(problems))
        sets = [argument for override in overrides for argument in ("--set", override)]
        command = [sys.executable, "-m", "srl_rlvr", "train", str(run_file), "--out", f"{folder}/out", *sets]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path})
        rows = pq.read_table(Path(folder) / "out" / "metrics.parquet").to_pylist()
    samples = sum(row["groups_drawn"] * 8 for row in rows[2:])
    rate = samples / (rows[-1]["seconds"] - rows[1]["seconds"])
    sample_s, update_s = (statistics.median(row[name] for row in rows[2:]) for name in ("sample_s", "update_s"))
    print(f"{side:<10}  {rate:>9.2f}  {sample_s:.1f}, {update_s:.1f}", flush=True)
    return rate


if __name__ == "__main__":
    main()
