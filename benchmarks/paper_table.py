"""Which sequence of stages learns most from how many demonstrations: the claim of Deng et al. (2510.25992), small.

    python benchmarks/paper_table.py            every cell that has no score yet, then the table and the plot
    python benchmarks/paper_table.py --quick    two cells of a few updates: it works
    python benchmarks/paper_table.py --table    only the table and the plot, of the scores that are there
    python benchmarks/paper_table.py --only number_filtering-16 --seeds 5    cells whose names begin so, of five seeds

A cell is one run of `srl-rlvr train` (family, demonstrations, sequence, seed) on the model of `srl-rlvr base build`,
and the scores of its result on held-out problems and on problems with longer solutions than any shown. Every stage
keeps its best weights by 100 dev problems. Two cells run at once, each on one core. Runs lie in `out/paper_table/`:
one that was interrupted goes on where it was. Scores are lines of `benchmarks/paper_table.jsonl`, kept with the code.

Leads are paired by problem and bootstrapped over seeds and problems; the best sequences are chosen anew in each draw.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _machine import commit, machine

HERE = Path(__file__).parent
OUT = Path("out/paper_table")
SAMPLES, DRAWS = 8, 10_000


@dataclass(frozen=True)
class Task:
    params: dict[str, Any]
    longer: dict[str, Any]  # params of solutions longer than any shown
    demonstrations: Sequence[int]
    step_tokens: int
    tokens: int  # of the longest solution here


TASKS = {
    "number_filtering": Task(
        {"min_numbers": 4, "max_numbers": 5, "min_decimals": 0, "max_decimals": 0},
        {"min_numbers": 7, "max_numbers": 7},
        (16, 64, 256),
        step_tokens=24,
        tokens=140,
    ),
    "number_sorting": Task(
        {"min_numbers": 4, "max_numbers": 5, "max_decimals": 0, "min_value": -9, "max_value": 9},
        {"min_numbers": 7, "max_numbers": 7},
        (64,),
        step_tokens=32,
        tokens=150,
    ),
    "word_sorting": Task(
        {"min_words": 4, "max_words": 5, "max_word_length": 4},
        {"min_words": 7, "max_words": 7},
        (64,),
        step_tokens=32,
        tokens=140,
    ),
}
SFT = 'kind = "sft"\nlearning_rate = 5e-4\nepochs = {epochs}\nbatch_size = 16'
SRL = 'kind = "srl"\nlearning_rate = 3e-4\nsteps = {steps}\nprompts_per_step = 16\nmax_tokens = {step_tokens}'
RLVR = 'kind = "rlvr"\nlearning_rate = 3e-4\nsteps = {steps}\nprompts_per_step = 16\nmax_tokens = {tokens}'
FORM = SFT.replace('kind = "sft"', 'kind = "sft"\nname = "form"')
UPDATES = {SFT: 160, SRL: 140, RLVR: 36, FORM: 160}  # that take about as long as each other
SEQUENCES: dict[str, list[tuple[str, float]]] = {  # stages, and their share of that time
    "base": [],
    "sft": [(SFT, 1.0)],
    "rlvr": [(RLVR, 1.0)],
    "srl": [(SRL, 1.0)],
    "sft-rlvr": [(SFT, 0.5), (RLVR, 0.5)],
    "srl-rlvr": [(SRL, 0.5), (RLVR, 0.5)],
    "sft-srl-rlvr": [(FORM, 0.1), (SRL, 0.45), (RLVR, 0.45)],
}


@dataclass(frozen=True)
class Cell:
    family: str
    demonstrations: int
    sequence: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.family}-{self.demonstrations}-{self.sequence}-{self.seed}"


@dataclass(frozen=True)
class Place:
    """Where cells run and how large they are."""

    out: Path
    scores: Path
    dev: int = 100
    held_out: int = 200
    updates: float = 1.0  # share of the full number
    every: int = 10

    @property
    def base(self) -> Path:
        return self.out / "base"


FULL = Place(OUT, HERE / "paper_table.jsonl")
QUICK = Place(OUT.with_name("paper_table_quick"), OUT.with_name("paper_table_quick") / "scores.jsonl", 8, 8, 0.02, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", default="", metavar="PREFIX")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    place = QUICK if options.quick else FULL
    cells = [cell for cell in all_cells(options.seeds) if cell.name.startswith(options.only)]
    if options.quick:
        cells = [Cell("number_filtering", 64, sequence, 0) for sequence in ("base", "sft-srl-rlvr")]
    if options.cell:
        run(next(cell for cell in all_cells(options.seeds) if cell.name == options.cell), place)
        return
    if not options.table:
        build_base(place, 5 if options.quick else None)
        done = read_scores(place)
        missing = [cell for cell in cells if cell not in done]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda cell: in_a_process(cell, options), missing))
    found = {cell: scores for cell, scores in read_scores(place).items() if cell in cells}
    print_table(found)
    if not options.quick:
        plot(found, HERE.parent / "docs" / "images" / "paper_table.svg")
    figures = {"base_pass8": base_pass8(found)} | {f"lead_low_{n}": lead(found, n)[0] for n in (16, 64)}
    print(json.dumps({"benchmark": "paper_table", "figures": figures, "machine": machine(), "commit": commit()}))


def all_cells(seeds: int) -> list[Cell]:
    return [
        Cell(family, demonstrations, sequence, seed)
        for seed in range(seeds)
        for family, task in TASKS.items()
        for demonstrations in task.demonstrations
        for sequence in SEQUENCES
        if sequence != "base" or demonstrations == 64
    ]


def build_base(place: Place, updates: int | None) -> None:
    if not (place.base / "model_card.json").is_file():
        command = [sys.executable, "-m", "srl_rlvr", "base", "build", "--out", str(place.base)]
        subprocess.run([*command, *(["--updates", str(updates)] if updates else [])], check=True, stdout=sys.stderr)


def in_a_process(cell: Cell, options: Namespace) -> None:
    """A cell that fails is said and left without a score; the others go on."""
    command = [sys.executable, __file__, "--cell", cell.name, "--seeds", str(options.seeds)]
    log = (QUICK if options.quick else FULL).out / f"{cell.name}.log"
    with log.open("a") as file:
        failed = subprocess.run(
            [*command, *(["--quick"] if options.quick else [])], stdout=file, stderr=subprocess.STDOUT
        ).returncode
    print(f"{cell.name}: {f'failed, see {log}' if failed else 'done'}", file=sys.stderr, flush=True)


def run(cell: Cell, place: Place) -> None:
    """Train and score one cell, and write its line."""
    from srl_rlvr import config as configs
    from srl_rlvr.cli import session
    from srl_rlvr.examples import generated, sources
    from srl_rlvr.seeds import derived_seed

    folder = place.out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(run_file(cell, place, SEQUENCES[cell.sequence] or SEQUENCES["sft"]))
    config = configs.load(folder / "run.toml")
    model, minutes = place.base, 0.0
    if SEQUENCES[cell.sequence]:
        session.train(config, folder / "run", resume=True, command=cell.name)
        model = folder / "run" / "model"
        minutes = json.loads((folder / "run" / "result.json").read_text())["minutes"]
    task = TASKS[cell.family]
    _, _, here = sources.load_all(config.data, config.seed)
    seed = derived_seed("longer", cell.seed)
    longer = generated.generate(cell.family, place.held_out, seed, task.params | task.longer)
    line = {
        "cell": vars(cell),
        "recipe": recipe(cell, place),
        "base": base_digest(place),
        "minutes": minutes,
        "here": score(model, here, task, cell.seed),
        "longer": score(model, longer, task, cell.seed),
        "commit": commit(),
        "machine": machine()["cpu"],
    }
    with place.scores.open("a") as file:
        file.write(json.dumps(line) + "\n")


def recipe(cell: Cell, place: Place) -> str:
    """Names how a cell is run."""
    return hashlib.sha256(run_file(cell, place, SEQUENCES[cell.sequence]).encode()).hexdigest()[:12]


def read_scores(place: Place) -> dict[Cell, Any]:
    """The newest line of each cell; those of another recipe or another base do not count."""
    if not place.scores.is_file():
        return {}
    lines = [json.loads(line) for line in place.scores.read_text().splitlines()]
    base = base_digest(place) if place.base.is_dir() else lines[-1]["base"]
    found = {Cell(**line["cell"]): line for line in lines if line["base"] == base}
    return {cell: line for cell, line in found.items() if line["recipe"] == recipe(cell, place)}


def base_digest(place: Place) -> str:
    """Machines of other instruction sets round otherwise, so they make another base of the same seed."""
    with (place.base / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def run_file(cell: Cell, place: Place, stages: list[tuple[str, float]]) -> str:
    task = TASKS[cell.family]
    texts = []
    for text, share in stages:
        steps = max(1, round(UPDATES[text] * share * place.updates))
        epochs = max(1, steps * 16 // cell.demonstrations)
        filled = text.format(steps=steps, epochs=epochs, step_tokens=task.step_tokens, tokens=task.tokens)
        texts.append(f"[[stages]]\n{filled}\n")
    params = ", ".join(f"{name} = {json.dumps(value)}" for name, value in task.params.items())
    return f"""name = "{cell.name}"
seed = {cell.seed}
checkpoint_every = 1000

[model]
base = "../base"
max_context = 512

[engine]
kind = "transformers"
threads = 1

[learner]
threads = 1

[verifier]
workers = 1

[[data]]
family = "{cell.family}"
params = {{ {params} }}
train = {cell.demonstrations}
dev = {place.dev}
held_out = {place.held_out}

{"".join(texts)}
[evaluation]
max_tokens = {task.tokens}
every = {place.every}
on_stages = false

[tracking]
mlflow = false
"""


def score(model: Path, examples: Any, task: Task, seed: int) -> dict[str, Any]:
    """Of each problem: whether it was solved greedily, by how many of 8 samples, and tokens of the greedy answer."""
    from srl_rlvr.batch import PASSED
    from srl_rlvr.cli import inference
    from srl_rlvr.engines import SamplingSpec
    from srl_rlvr.stages import rlvr

    options = Namespace(model=str(model), limit=None, engine="transformers", max_tokens=task.tokens, max_context=512)
    with inference.open_model(options) as opened:
        prompts = rlvr.prompts(examples, opened.tokenizer, "evaluation", think=False)
        greedy, verdicts, _ = opened.sample(prompts, SamplingSpec(1, 0.0, opened.max_tokens))
        _, sampled, _ = opened.sample(prompts, SamplingSpec(SAMPLES, 1.0, opened.max_tokens, seed=seed))
    passed = sampled["reward"].to_numpy().reshape(-1, SAMPLES) >= PASSED
    return {
        "greedy": (verdicts["reward"].to_numpy() >= PASSED).astype(int).tolist(),
        "of_8": passed.sum(1).tolist(),
        "tokens": [len(ids) for ids in greedy["token_ids"].to_pylist()],
    }


def print_table(found: dict[Cell, Any]) -> None:
    columns = ("greedy", "95 %", "sampled", "pass@8", "longer", "tokens", "minutes")
    print(f"{'family':<16}{'demos':>6}  {'sequence':<14}{'seeds':>5}" + "".join(f"{name:>10}" for name in columns))
    for family, n, sequence in dict.fromkeys((c.family, c.demonstrations, c.sequence) for c in found):
        of = [s for c, s in found.items() if (c.family, c.demonstrations, c.sequence) == (family, n, sequence)]
        here = [s["here"] for s in of]
        solved = np.array([h["greedy"] for h in here], float)
        low, high = np.quantile([solved[draw].mean() for draw in draws(solved.shape, 1000)], (0.025, 0.975))
        sampled = np.array([h["of_8"] for h in here])
        shown = (
            f"{solved.mean():.1%}",
            f"{100 * low:.0f}-{100 * high:.0f}",
            f"{sampled.mean() / SAMPLES:.1%}",
            f"{(sampled > 0).mean():.1%}",
            f"{np.mean([s['longer']['greedy'] for s in of]):.1%}",
            f"{np.mean([h['tokens'] for h in here]):.0f}",
            f"{np.mean([s['minutes'] for s in of]):.1f}",
        )
        print(f"{family:<16}{n:>6}  {sequence:<14}{len(of):>5}" + "".join(f"{text:>10}" for text in shown))


def plot(found: dict[Cell, Any], path: Path) -> None:
    """Greedy pass rate against demonstrations, a line for each sequence, of the family with several columns."""
    family = next(name for name, task in TASKS.items() if len(task.demonstrations) > 1)
    if not any(cell.family == family for cell in found):
        return
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for sequence in SEQUENCES:
        of: dict[int, list[float]] = {}
        for cell, scores in found.items():
            if (cell.family, cell.sequence) == (family, sequence):
                of.setdefault(cell.demonstrations, []).append(float(np.mean(scores["here"]["greedy"])))
        if of and sequence != "base":
            axes.plot(sorted(of), [100 * np.mean(of[n]) for n in sorted(of)], marker="o", label=sequence)
    axes.set(xscale="log", xlabel=f"demonstrations ({family})", ylabel="held-out problems solved greedily, %")
    axes.set_xticks(TASKS[family].demonstrations, map(str, TASKS[family].demonstrations))
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def base_pass8(found: dict[Cell, Any]) -> float | None:
    """Of the family that the base solves most of."""
    of: dict[str, list[np.ndarray]] = {}
    for cell, scores in found.items():
        if cell.sequence == "base":
            of.setdefault(cell.family, []).append(np.array(scores["here"]["of_8"]) > 0)
    return round(max(float(np.mean(solved)) for solved in of.values()), 4) if of else None


def lead(found: dict[Cell, Any], demonstrations: int) -> tuple[float | None, float | None, float | None]:
    """(lower, mean, upper) of the 95 % interval of the lead of the best sequence with SRL over the best without; the
    mean over the families that have all of their cells."""
    families = []
    for family in TASKS:
        solved: dict[str, np.ndarray] = {}  # [seeds, problems]
        for sequence in SEQUENCES:
            key = (family, demonstrations, sequence)
            rows = [s["here"]["greedy"] for c, s in found.items() if (c.family, c.demonstrations, c.sequence) == key]
            if rows:
                solved[sequence] = np.array(rows, float)
        if set(solved) >= set(SEQUENCES) - {"base"} and len({rows.shape for rows in solved.values()}) == 1:
            families.append(solved)
    if not families:
        return None, None, None
    gaps = [
        [best_lead({name: rows[draw].mean() for name, rows in solved.items()}) for draw in draws(shape, DRAWS)]
        for solved in families
        for shape in [solved["srl"].shape]
    ]
    mean = np.mean([best_lead({name: rows.mean() for name, rows in solved.items()}) for solved in families])
    low, high = np.quantile(np.mean(gaps, axis=0), (0.025, 0.975))
    return round(float(low), 4), round(float(mean), 4), round(float(high), 4)


def best_lead(means: dict[str, Any]) -> float:
    with_srl = max(mean for name, mean in means.items() if "srl" in name)
    return float(with_srl - max(mean for name, mean in means.items() if "srl" not in name))


def draws(shape: tuple[int, ...], count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which seeds and, of each, which problems."""
    draw = np.random.default_rng(0)
    seeds, problems = shape
    return [(draw.integers(seeds, size=(seeds, 1)), draw.integers(problems, size=shape)) for _ in range(count)]


if __name__ == "__main__":
    main()
