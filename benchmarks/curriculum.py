"""How many samples RLVR needs on problems of mixed difficulty: informative levels against uniform sampling.

    python benchmarks/curriculum.py            three seeds, both ways each
    python benchmarks/curriculum.py --quick    one seed, a few updates: it works

SmolLM2-135M-Instruct on sums of 2 to 9 numbers, as many problems of each length: half are too hard at first. The same
warm-up by SFT on 64 sums of 2 and 3 numbers, then RLVR with either curriculum, two runs at once, each on one core, and
a look at 240 dev problems of all lengths every three updates. A pass rate is reached where the mean of two looks that
follow each other reaches it; it was set beforehand. Samples are all that were drawn, with those of groups that carried
no signal. A run ends where it is reached. Runs lie in `out/curriculum/`: one that was interrupted goes on where it was.
Prints a table and one JSON line; `samples_ratio` is the median over seeds, null where most do not reach it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from _machine import commit, machine

from srl_rlvr import checkpoints

Curve = list[tuple[int, float]]

CURRICULA = ("uniform", "informative")
OUT = Path(__file__).parents[1] / "out"
TERMS = range(2, 10)
GROUP = 8
TARGET = 0.5
SHOWN = 64  # in the warm-up, half of 2 numbers, half of 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    ratios = []
    print(f"{'seed':>4}{'uniform':>10}{'informative':>13}{'ratio':>8}  dev at the looks of uniform; of informative")
    place = OUT / ("curriculum_quick" if options.quick else "curriculum")
    seeds = range(1 if options.quick else options.seeds)
    with ThreadPoolExecutor(2) as two:
        curves = two.map(partial(_curve, place, options.quick), [(seed, how) for seed in seeds for how in CURRICULA])
        for seed, uniform, informative in zip(seeds, curves, curves, strict=False):
            # Where uniform sampling does not get there it needs more than it drew, so the ratio is at most this.
            needed = min(_samples_to(uniform, TARGET), uniform[-1][0])
            ratios.append(_samples_to(informative, TARGET) / needed)
            looks = "; ".join(" ".join(f"{100 * score:.0f}" for _, score in curve) for curve in (uniform, informative))
            print(f"{seed:>4}{_samples_to(uniform, TARGET):>10.0f}{_samples_to(informative, TARGET):>13.0f}"
                  f"{ratios[-1]:>8.2f}  {looks}", flush=True)  # fmt: skip
    ratio = statistics.median(ratios)
    figures = {"samples_ratio": round(ratio, 3) if math.isfinite(ratio) else None}
    print(json.dumps({"benchmark": "curriculum", "figures": figures, "machine": machine(), "commit": commit()}))


def _curve(place: Path, quick: bool, of: tuple[int, str]) -> Curve:
    """Of one run, which is ended once it has got there."""
    seed, curriculum = of
    folder = place / f"{curriculum}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(_run_file(curriculum, seed, quick))
    command = [sys.executable, "-m", "srl_rlvr", "train", "run.toml", "--out", "out", "--resume"]
    curve = _looks(folder / "out")
    if not math.isfinite(_samples_to(curve, TARGET)):
        with (folder / "log").open("a") as log:
            run = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
            while (code := run.poll()) is None:
                time.sleep(5)
                curve = _looks(folder / "out")
                if math.isfinite(_samples_to(curve, TARGET)):
                    run.terminate()
                    run.wait()
                    return curve
        if code:
            raise SystemExit(f"error: {folder.name} failed, see {log.name}")
    return _looks(folder / "out")


def _looks(out: Path) -> Curve:
    """(samples drawn so far, dev pass rate) at each look during RLVR, its beginning left out."""
    newest = checkpoints.latest(out)
    metrics = checkpoints.read(newest)[1].metrics if newest else []
    drawn = [row for row in metrics if row["stage"] == "rlvr"]
    samples = accumulate(int(row["groups_drawn"]) * GROUP for row in drawn)
    return [(count, row["dev"]) for count, row in zip(samples, drawn, strict=True) if "dev" in row]


def _samples_to(curve: Curve, score: float) -> float:
    reached = (samples for (_, before), (samples, now) in pairwise(curve) if (before + now) / 2 >= score)
    return next(reached, math.inf)


def _run_file(curriculum: str, seed: int, quick: bool) -> str:
    params: dict[str, Any] = {"operators": ["+"], "allow_parentheses": False, "allow_negation": False}
    sources = "".join(
        '[[data]]\nfamily = "basic_arithmetic"\nparams = { '
        + ", ".join(f"{k} = {json.dumps(v)}" for k, v in (params | {"min_terms": n, "max_terms": n}).items())
        + f" }}\ntrain = {SHOWN // 2 if n <= 3 else 96}\ndev = {2 if quick else 30}\nheld_out = 1\n"
        for n in TERMS
    )
    return f"""name = "curriculum-{curriculum}-{seed}"
seed = {seed}
checkpoint_every = 3
[model]
base = "smollm2-135m-instruct"
max_context = 192
lora_rank = 16
[engine]
kv_cache_gib = 0.5
threads = 1
[learner]
threads = 1
[verifier]
workers = 1
{sources}
[[stages]]
kind = "sft"
learning_rate = 5e-4
examples = {SHOWN}
epochs = 1
batch_size = 8
[[stages]]
kind = "rlvr"
curriculum = "{curriculum}"
learning_rate = 2e-4
steps = {3 if quick else 24}
prompts_per_step = 8
group_size = {GROUP}
max_tokens = 104
[evaluation]
max_tokens = 104
every = {1 if quick else 3}
on_stages = false
[tracking]
mlflow = false
"""


if __name__ == "__main__":
    main()
