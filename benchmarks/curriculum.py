"""How many samples RLVR needs on problems of mixed difficulty: informative levels against uniform sampling.

    python benchmarks/curriculum.py            three seeds, both ways each
    python benchmarks/curriculum.py --quick    one seed, a few updates of a model of 4 million parameters

SmolLM2-135M-Instruct on sums of 2 to 6 numbers of 1 to 4 digits, as many problems of each of the 20 levels: most are
out of its reach. A warm-up by SFT on 24 sums of 2 and 3 digits, the same for both, then RLVR with either curriculum,
two runs at once, each on one core, and a look at 400 dev problems of all levels every three updates. A pass rate is
reached where the mean of two looks that follow each other reaches it, between such means by interpolation. Samples are
all that were drawn, with those of groups that carried no signal. A run ends where it is reached. Runs lie in
`out/curriculum/`: one that was interrupted goes on where it was. Prints a table and one JSON line; `samples_ratio` is
the median over seeds, null where most do not reach it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from _machine import MODEL, SMALL, tell

from srl_rlvr import checkpoints

Curve = list[tuple[int, float]]

CURRICULA = ("uniform", "informative")
OUT = Path(__file__).parents[1] / "out"
TERMS, DIGITS = range(2, 7), range(1, 5)
GROUP = 8
SEEDS = 3
TARGET = 0.12  # what uniform sampling reached with another seed, 100; docs/learning.md says when it was chosen
SHOWN = 24  # in the warm-up, half of 2 numbers, half of 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    ratios = []
    print(f"{'seed':>4}{'uniform':>10}{'informative':>13}{'ratio':>8}  dev at the looks of uniform; of informative")
    place = OUT / ("curriculum_quick" if options.quick else "curriculum")
    seeds = range(1 if options.quick else options.seeds)
    if options.quick:
        shutil.rmtree(place, ignore_errors=True)
    with ThreadPoolExecutor(2) as two:
        list(two.map(partial(_warm_up, place, options.quick), seeds))
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
    tell("curriculum", figures, whole=not options.quick and options.seeds == SEEDS)


def _curve(place: Path, quick: bool, of: tuple[int, str]) -> Curve:
    """Of one run, which is ended once it has got there."""
    seed, curriculum = of
    out = place / f"{curriculum}-{seed}" / "out"
    curve = _looks(out)
    if not math.isfinite(_samples_to(curve, TARGET)):
        run, log = _start(out.parent, _run_file(curriculum, seed, quick))
        while (code := run.poll()) is None:
            time.sleep(1 if quick else 5)
            curve = _looks(out)
            if math.isfinite(_samples_to(curve, TARGET)):
                run.terminate()
                run.wait()
                return curve
        _check(code, log)
    return _looks(out)


def _warm_up(place: Path, quick: bool, seed: int) -> None:
    folder = place / f"warm-up-{seed}"
    if not (folder / "out" / "model").is_dir():
        run, log = _start(folder, _warm_up_file(seed, quick))
        _check(run.wait(), log)


def _start(folder: Path, run_file: str) -> tuple[subprocess.Popen[bytes], Path]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(run_file)
    command = [sys.executable, "-m", "srl_rlvr", "train", "run.toml", "--out", "out", "--resume"]
    log = folder / "log"
    with log.open("a") as written:
        return subprocess.Popen(command, cwd=folder, stdout=written, stderr=subprocess.STDOUT), log


def _check(code: int, log: Path) -> None:
    if code:
        raise SystemExit(f"error: {log.parent.name} failed, see {log}")


def _looks(out: Path) -> Curve:
    """(samples drawn so far, dev pass rate) at each look during RLVR, its beginning left out."""
    newest = checkpoints.latest(out)
    metrics = checkpoints.read(newest)[1].metrics if newest else []
    drawn = [row for row in metrics if row["stage"] == "rlvr"]
    samples = accumulate(int(row["groups_drawn"]) * GROUP for row in drawn)
    return [(count, row["dev"]) for count, row in zip(samples, drawn, strict=True) if "dev" in row]


def _samples_to(curve: Curve, score: float) -> float:
    means = [((a + b) / 2, (x + y) / 2) for (a, x), (b, y) in pairwise(curve)]
    if means and means[0][1] >= score:
        return means[0][0]
    reached = (a + (b - a) * (score - x) / (y - x) for (a, x), (b, y) in pairwise(means) if y >= score)
    return next(reached, math.inf)


def _warm_up_file(seed: int, quick: bool) -> str:
    return f"""{_head("warm-up", seed, SMALL if quick else MODEL, quick)}
{"".join(_data(terms, 1, train=SHOWN // 2) for terms in TERMS[:2])}
[[stages]]
kind = "sft"
learning_rate = 5e-4
examples = {SHOWN}
epochs = 1
batch_size = 8
"""


def _run_file(curriculum: str, seed: int, quick: bool) -> str:
    tokens = 16 if quick else 112
    sources = "".join(_data(n, digits, 2 if quick else 96, 1 if quick else 20) for digits in DIGITS for n in TERMS)
    return f"""{_head(f"curriculum-{curriculum}-{seed}", seed, f"../warm-up-{seed}/out/model", quick)}
{sources}
[[stages]]
kind = "rlvr"
curriculum = "{curriculum}"
learning_rate = 2e-4
steps = {2 if quick else 24}
prompts_per_step = 8
group_size = {GROUP}
max_tokens = {tokens}
[evaluation]
max_tokens = {tokens}
every = {1 if quick else 3}
on_stages = false
"""


def _head(name: str, seed: int, base: str | Path, quick: bool) -> str:
    kind, context = ("transformers", 512) if quick else ("vllm", 192)
    return f"""name = "{name}"
seed = {seed}
checkpoint_every = 3
[model]
base = "{base}"
max_context = {context}
lora_rank = 16
[engine]
kind = "{kind}"
kv_cache_gib = 0.5
threads = 1
[learner]
threads = 1
[verifier]
workers = 1
[tracking]
mlflow = false"""


def _data(terms: int, digits: int, train: int, dev: int = 0) -> str:
    params: dict[str, Any] = {"operators": ["+"], "allow_parentheses": False, "allow_negation": False}
    params |= {"min_terms": terms, "max_terms": terms, "min_digits": digits, "max_digits": digits}
    written = ", ".join(f"{name} = {json.dumps(value)}" for name, value in params.items())
    return f"""
[[data]]
family = "basic_arithmetic"
params = {{ {written} }}
train = {train}
dev = {dev}
held_out = 1
"""


if __name__ == "__main__":
    main()
