"""How many samples RLVR needs on problems of mixed difficulty: informative levels against uniform sampling.

    python benchmarks/curriculum.py            three seeds, both ways each, on the model of `srl-rlvr base build`
    python benchmarks/curriculum.py --quick    one seed, a few updates of a base of five updates: it works
    python benchmarks/curriculum.py --base out/paper_table/base    with a base that is there

`number_sorting` of 2 to 7 numbers, as many problems of each length. The same warm-up by SFT on 96 problems of 2 and 3
numbers, then RLVR with either curriculum, and a look at 96 dev problems of all lengths every four updates. The pass
rate to reach is the best that uniform sampling reaches; samples are all that were drawn, with those of groups that
carried no signal.
Prints a table and one JSON line; `samples_ratio` is the median over seeds, null where most do not reach it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from _machine import commit, machine

LENGTHS = range(2, 8)
GROUP = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = options.base or _built(folder / "base", options.quick)
        print(f"{'seed':>4}{'to reach':>10}{'uniform':>10}{'informative':>13}{'ratio':>8}  best of informative")
        for seed in range(1 if options.quick else options.seeds):
            curves = {
                curriculum: _curve(folder / f"{curriculum}-{seed}", base.resolve(), curriculum, seed, options.quick)
                for curriculum in ("uniform", "informative")
            }
            target = max(score for _, score in curves["uniform"])
            samples = {name: _samples_to(curve, target) for name, curve in curves.items()}
            ratios.append(samples["informative"] / samples["uniform"])
            best = max(score for _, score in curves["informative"])
            print(f"{seed:>4}{target:>10.1%}{samples['uniform']:>10.0f}{samples['informative']:>13.0f}{ratios[-1]:>8.2f}"
                  f"  {best:.1%}", flush=True)  # fmt: skip
    ratio = statistics.median(ratios)
    figures = {"samples_ratio": round(ratio, 3) if math.isfinite(ratio) else None}
    print(json.dumps({"benchmark": "curriculum", "figures": figures, "machine": machine(), "commit": commit()}))


def _built(folder: Path, quick: bool) -> Path:
    command = [sys.executable, "-m", "srl_rlvr", "base", "build", "--out", str(folder)]
    subprocess.run([*command, *(["--updates", "5"] if quick else [])], check=True, stdout=sys.stderr)
    return folder


def _curve(folder: Path, base: Path, curriculum: str, seed: int, quick: bool) -> list[tuple[int, float]]:
    """(samples drawn so far, dev pass rate) at each look during RLVR, its beginning left out."""
    folder.mkdir()
    (folder / "run.toml").write_text(_run_file(base, curriculum, seed, quick))
    command = [sys.executable, "-m", "srl_rlvr", "train", str(folder / "run.toml"), "--out", str(folder / "out")]
    subprocess.run(command, check=True, stdout=sys.stderr)
    samples, found = 0, []
    for row in pq.read_table(folder / "out" / "metrics.parquet").to_pylist():
        if row["stage"] == "rlvr":
            samples += int(row["groups_drawn"]) * GROUP
            if row["dev"] is not None:
                found.append((samples, row["dev"]))
    return found


def _samples_to(curve: list[tuple[int, float]], score: float) -> float:
    return next((samples for samples, reached in curve if reached >= score), math.inf)


def _run_file(base: Path, curriculum: str, seed: int, quick: bool) -> str:
    params: dict[str, Any] = {"max_decimals": 0, "min_value": -9, "max_value": 9}
    sources = "".join(
        '[[data]]\nfamily = "number_sorting"\n'
        + "params = { "
        + ", ".join(f"{k} = {v}" for k, v in (params | {"min_numbers": n, "max_numbers": n}).items())
        + f" }}\ntrain = 48\ndev = {2 if quick else 16}\nheld_out = 4\n"
        for n in LENGTHS
    )
    return f"""name = "curriculum-{curriculum}-{seed}"
seed = {seed}
checkpoint_every = 1000
[model]
base = "{base}"
max_context = 512
[engine]
kind = "transformers"
{sources}
[[stages]]
kind = "sft"
learning_rate = 5e-4
examples = 96
epochs = {1 if quick else 8}
batch_size = 16
[[stages]]
kind = "rlvr"
curriculum = "{curriculum}"
learning_rate = 2e-4
steps = {4 if quick else 60}
prompts_per_step = 8
group_size = {GROUP}
max_tokens = 130
[evaluation]
max_tokens = 150
every = 4
on_stages = false
[tracking]
mlflow = false
"""


if __name__ == "__main__":
    main()
