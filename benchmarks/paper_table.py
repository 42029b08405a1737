"""Which sequence of stages learns most from how many demonstrations: the claim of Deng et al. (2510.25992), small.

    python benchmarks/paper_table.py            every cell that has no score yet, then the table and the plot
    python benchmarks/paper_table.py --quick    four cells of a few updates: it works
    python benchmarks/paper_table.py --table    only the table and the plot, of the scores that are there
    python benchmarks/paper_table.py --only number_sorting-16 --seeds 5    cells whose names begin so, of five seeds

A cell is one run of `srl-rlvr train` (task, demonstrations, sequence, seed) on a small base (of sums: one that thinks;
one task: on SmolLM2-135M-Instruct with LoRA), and the scores of its result on held-out problems and on problems with
longer solutions than any shown. The small bases are kept beside this file, as machines with other instructions round
otherwise, and make others of the same seed: `paper_table_base/` is of `srl-rlvr base build`,
`paper_table_thinking_base/` of the same with `--think --updates 1000 --family basic_arithmetic`, and
`paper_table_rewriting_base/` with `--think --updates 600 --family rewritten_sums`. Every stage keeps its best weights
by 50 dev problems. TRL's SFT→GRPO is a sequence as any other (`_trl_sequence.py`). Two cells run at once, on a core
each. Runs lie in `out/paper_table/`: one that was interrupted goes on where it was. Scores are lines of
`benchmarks/paper_table.jsonl`, kept with the code.

Leads are paired by problem and bootstrapped over seeds and problems; the best sequences are chosen anew in each draw,
of those that have run all seeds of SFT.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _trl_sequence
import numpy as np
from _machine import commit, machine, tell

HERE = Path(__file__).parent
OUT = HERE.parent / "out" / "paper_table"
BASE = HERE / "paper_table_base"
THINKING_BASE = HERE / "paper_table_thinking_base"
REWRITING_BASE = HERE / "paper_table_rewriting_base"
SAMPLES, SAMPLED = 8, 100  # answers to each of so many held-out problems, beside the greedy one to all
DRAWS = 10_000
TRL = "trl-sft-grpo"  # by TRL's trainers
SMOLLM2_NAME = "smollm2-135m-instruct"
ROWS = ("base", "sft", "rlvr", "guided-srl", "sft-rlvr", "guided-srl-rlvr", "sft-whole-srl-rlvr", TRL)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: its part of the run file, and the stages that sequences are made of."""

    model: Path | str
    setting: str
    stages: dict[str, str]
    updates: dict[str, int]  # of each stage, that take about as long as each other
    batch: int  # solutions (SFT) or problems (RLVR) in an update
    every: int  # updates between two looks at the dev problems
    think: bool = False  # before each line, in sequences that do not begin with SFT: demonstrations hold no thoughts
    sequences: dict[str, list[tuple[str, float]]] = field(default_factory=dict)  # that are other than in SEQUENCES
    few: int = 0  # demonstrations up to which they are those of SEQUENCES_OF_FEW


def stages(sft: float, srl: float, rlvr: float, groups: str) -> dict[str, str]:
    """By name, with these rates and SRL's `groups`: `guided` is SRL on single steps with the expert in the group,
    `whole` the same on whole solutions; `steps` is SRL on single steps without the expert, `own` the same with thoughts
    of the policy's own before the earlier ones."""
    by_step, whole = (
        f'kind = "srl"\nlearning_rate = {srl}\nsteps = {{steps}}\nmax_tokens = {{{longest}}}\n{groups}'
        for longest in ("step_tokens", "tokens")
    )
    expert, tokens = "\nexpert_in_group = true", '\nmeasure = "tokens"'
    return {
        "sft": supervised(sft),
        "guided": by_step + '\nname = "guided"' + expert,
        "steps": by_step + '\nname = "steps"' + tokens,
        "own": by_step + '\nname = "own"\nown_thoughts = true' + tokens,
        "whole": whole + '\nname = "whole"\nlines_per_action = 0' + expert,
        "rlvr": f'kind = "rlvr"\nlearning_rate = {rlvr}\nsteps = {{steps}}\nmax_tokens = {{tokens}}\n'
        "prompts_per_step = {batch}",
    }


def supervised(rate: float) -> str:
    return f'kind = "sft"\nlearning_rate = {rate}\nepochs = {{epochs}}\nbatch_size = {{batch}}'


def small(base: Path, srl: float, updates: dict[str, int], every: int) -> Recipe:
    return Recipe(
        base,
        f'[model]\nbase = "../../../benchmarks/{base.name}"\nmax_context = 512\n\n'
        '[engine]\nkind = "transformers"\nthreads = 1\n',
        stages(sft=5e-4, srl=srl, rlvr=1e-4, groups="prompts_per_step = 32\ngroup_size = 4"),
        updates,
        batch=16,
        every=every,
    )


SMALL = small(BASE, 4e-4, {"sft": 120, "guided": 50, "whole": 50, "rlvr": 32}, every=15)


def thinking(base: Path, srl: float, star: float, every: int, rlvr: float, few: int) -> Recipe:
    """`srl` is the rate of more demonstrations than `few`; `star` that of SFT with thoughts of the policy's own; `rlvr`
    the share of the time that RLVR alone has, so that it takes as long as own-srl-rlvr. The stage `near` is SRL's `own`
    drawn anew, at a low rate and with a KL term to the weights that it begins with."""
    of_small = small(base, srl, {"sft": 240, "star": 80, "steps": 72, "own": 116, "near": 116, "rlvr": 32}, every)
    star_thoughts = '\nname = "star-{index}"\nown_thoughts = true\nmax_tokens = {step_tokens}'
    drawn_anew = small(base, 5e-5, {}, every).stages["own"].replace('"own"', '"own-{index}"') + "\nkl = 0.1"
    return replace(
        of_small,
        stages=of_small.stages | {"star": supervised(star) + star_thoughts, "near": drawn_anew},
        think=True,
        sequences={"rlvr": [("rlvr", rlvr)]},
        few=few,
    )


SMOLLM2 = Recipe(
    SMOLLM2_NAME,
    f'[model]\nbase = "{SMOLLM2_NAME}"\nmax_context = 256\nlora_rank = 16\n\n'
    "[engine]\nkv_cache_gib = 0.5\nthreads = 1\n",
    stages(sft=5e-4, srl=3e-4, rlvr=2e-4, groups="prompts_per_step = 8\ngroup_size = 8"),
    {"sft": 28, "guided": 32, "rlvr": 20},
    batch=8,
    every=4,
    sequences={"sft-rlvr": [("sft", 0.25), ("rlvr", 0.75)]},
)
SUMS = {"operators": ["+"], "allow_parentheses": False, "allow_negation": False}


@dataclass(frozen=True)
class Task:
    family: str
    params: dict[str, Any]
    longer: dict[str, Any]  # params of solutions longer than any shown
    demonstrations: Sequence[int]
    step_tokens: int
    tokens: int  # of the longest solution here
    recipe: Recipe = SMALL
    sequences: Sequence[str] = ROWS


TASKS = {
    "number_sorting": Task(
        "number_sorting",
        {"min_numbers": 4, "max_numbers": 5, "max_decimals": 0, "min_value": -9, "max_value": 9},
        {"min_numbers": 6, "max_numbers": 6},
        (16, 64, 256),
        step_tokens=32,
        tokens=150,
    ),
    "number_filtering": Task(
        "number_filtering",
        {"min_numbers": 4, "max_numbers": 5, "min_decimals": 0, "max_decimals": 0},
        {"min_numbers": 6, "max_numbers": 6},
        (64,),
        step_tokens=24,
        tokens=140,
    ),
    "word_sorting": Task(
        "word_sorting",
        {"min_words": 4, "max_words": 5, "max_word_length": 4},
        {"min_words": 6, "max_words": 6},
        (64,),
        step_tokens=32,
        tokens=140,
    ),
    "thinking_sums": Task(
        "basic_arithmetic",
        {"min_digits": 2, "max_digits": 2} | SUMS | {"min_terms": 4, "max_terms": 4},
        {"min_terms": 6, "max_terms": 6},
        (16, 64),
        step_tokens=72,
        tokens=300,
        recipe=thinking(THINKING_BASE, srl=2e-4, star=1e-4, every=35, rlvr=1.2, few=16),
        sequences=("base", "sft", "rlvr", "sft-rlvr", "star-rlvr", "own-srl-rlvr", TRL),
    ),
    "rewritten_sums": Task(
        "rewritten_sums",
        {"min_digits": 2, "max_digits": 2, "min_terms": 5, "max_terms": 5},
        {"min_terms": 6, "max_terms": 6},
        (16, 64),
        step_tokens=88,
        tokens=330,
        recipe=thinking(REWRITING_BASE, srl=5e-5, star=5e-5, every=10, rlvr=0.75, few=64),
        sequences=("base", "sft", "rlvr", "sft-rlvr", "star-rlvr", "own-srl-rlvr", TRL),
    ),
    "smollm2_sums": Task(
        "basic_arithmetic",
        {"min_terms": 4, "max_terms": 4} | SUMS,
        {"min_terms": 6, "max_terms": 6},
        (16,),
        step_tokens=20,
        tokens=64,
        recipe=SMOLLM2,
        sequences=("sft", "sft-rlvr", "guided-srl-rlvr"),
    ),
}
SEQUENCES: dict[str, list[tuple[str, float]]] = {  # stages, and their share of the time
    "base": [],
    "sft": [("sft", 1.0)],
    "rlvr": [("rlvr", 0.4)],  # without signal each batch is refilled twice
    "guided-srl": [("guided", 1.0)],
    "sft-rlvr": [("sft", 0.375), ("rlvr", 0.5)],
    "star-rlvr": [("star", 1.0), ("star", 1.0), ("star", 1.0), ("rlvr", 0.4)],
    "guided-srl-rlvr": [("guided", 0.6), ("rlvr", 0.4)],
    "own-srl-rlvr": [("steps", 0.5), ("own", 0.6), ("rlvr", 0.4)],
    "sft-whole-srl-rlvr": [("sft", 0.375), ("whole", 0.3), ("rlvr", 0.25)],
    TRL: [("sft", 0.375), ("rlvr", 0.5)],
}
SEQUENCES_OF_FEW: dict[str, list[tuple[str, float]]] = {
    "own-srl-rlvr": [("near", 0.25), ("near", 0.25), ("near", 0.25), ("rlvr", 0.4)],
}
MANY = 256  # demonstrations from which on SFT still learns when three eighths of the time are over
SEQUENCES_OF_MANY: dict[str, list[tuple[str, float]]] = {
    "sft-rlvr": [("sft", 0.75), ("rlvr", 0.25)],
    "sft-whole-srl-rlvr": [("sft", 0.75), ("whole", 0.15), ("rlvr", 0.1)],
    TRL: [("sft", 0.75), ("rlvr", 0.25)],
}


@dataclass(frozen=True)
class Cell:
    task: str
    demonstrations: int
    sequence: str
    seed: int
    changes: str = ""  # to its run file, as by --set

    @property
    def name(self) -> str:
        return "-".join([self.task, str(self.demonstrations), self.sequence, str(self.seed), *self.changes.split()])


@dataclass(frozen=True)
class Place:
    """Where cells run and how large they are."""

    out: Path
    scores: Path
    dev: int = 50
    held_out: int = 200
    updates: float = 1.0  # share of the full number


FULL = Place(OUT, HERE / "paper_table.jsonl")
QUICK = Place(OUT.with_name("paper_table_quick"), OUT.with_name("paper_table_quick") / "scores.jsonl", 8, 8, 0.02)


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
        cells = [Cell("number_sorting", 16, sequence, 0) for sequence in ("base", "sft-whole-srl-rlvr", TRL)]
        cells.append(Cell("thinking_sums", 16, "own-srl-rlvr", 0))
    if options.cell:
        run(next(cell for cell in all_cells(options.seeds) if cell.name == options.cell), place)
        return
    if not options.table:
        begin_anew(place, options.quick)
        done = read_scores(place)
        missing = [cell for cell in cells if cell not in done]
        in_processes(__file__, missing, place, options)
    scores = read_scores(place)
    seeds = 1 + max((cell.seed for cell in scores), default=0)  # some cells have run more than others
    found = {cell: scores[cell] for cell in all_cells(seeds) if cell in scores and cell.name.startswith(options.only)}
    rows: dict[str, list[Any]] = {}
    for cell, of_cell in found.items():
        rows.setdefault(f"{cell.task:<16}{cell.demonstrations:>4}  {cell.sequence}", []).append(of_cell)
    print_table(rows)
    if not options.quick:
        plot(found, HERE.parent / "docs" / "images" / "paper_table.svg")
    figures = {"base_pass8": base_pass8(found)} | print_leads(found)
    tell("paper_table", figures, whole=not (options.quick or options.only))


def all_cells(seeds: int) -> list[Cell]:
    return [
        Cell(name, demonstrations, sequence, seed)
        for seed in range(seeds)
        for name, task in TASKS.items()
        for demonstrations in task.demonstrations
        for sequence in task.sequences
        if SEQUENCES[sequence] or demonstrations == task.demonstrations[0]
    ]


def begin_anew(place: Place, quick: bool) -> None:
    """A quick run does not go on from the one before it."""
    if quick:
        shutil.rmtree(place.out, ignore_errors=True)


def in_processes(script: str, cells: Sequence[Any], place: Place, options: Namespace) -> None:
    """Two at once, by name. A cell that fails is said and left without a score; the others go on."""

    def one(cell: Any) -> None:
        command = [sys.executable, script, "--cell", cell.name, "--seeds", str(options.seeds)]
        log = place.out / f"{cell.name}.log"
        with log.open("a") as file:
            failed = subprocess.run(
                [*command, *(["--quick"] if options.quick else [])], stdout=file, stderr=subprocess.STDOUT
            ).returncode
        print(f"{cell.name}: {f'failed, see {log}' if failed else 'done'}", file=sys.stderr, flush=True)

    place.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, cells))


def run(cell: Cell, place: Place) -> None:
    """Train and score one cell, and write its line."""
    import torch

    from srl_rlvr import config as configs
    from srl_rlvr.cli import session
    from srl_rlvr.examples import generated, sources
    from srl_rlvr.seeds import derived_seed

    torch.set_num_threads(1)  # TRL and the scoring are of this process, and two cells run at once
    folder = place.out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    task = TASKS[cell.task]
    (folder / "run.toml").write_text(run_file(cell, place, sequence_of(cell) or SEQUENCES["sft"]))
    config = configs.load(folder / "run.toml", cell.changes.split())
    model, minutes = task.recipe.model, 0.0
    if cell.sequence == TRL:
        minutes, model = _trl_sequence.train(config, Path(model), folder), folder / "model"
    elif sequence_of(cell):
        of_recipe = folder / f"run-{recipe(cell, place)}"
        session.train(config, of_recipe, resume=True, command=cell.name)
        model = of_recipe / "model"
        minutes = json.loads((of_recipe / "result.json").read_text())["minutes"]
    _, _, here = sources.load_all(config.data, config.seed)
    seed = derived_seed("longer", cell.seed)
    longer = generated.generate(task.family, place.held_out, seed, task.params | task.longer)
    line = {
        "cell": vars(cell),
        "recipe": recipe(cell, place),
        "base": base_digest(task.recipe.model),
        "minutes": minutes,
        "here": score(model, here, cell, SAMPLES),
        "longer": score(model, longer, cell),
        "commit": commit(),
        "machine": machine()["cpu"],
    }
    with place.scores.open("a") as file:
        file.write(json.dumps(line) + "\n")


def recipe(cell: Cell, place: Place) -> str:
    """Names how a cell is run."""
    text = run_file(cell, place, sequence_of(cell)) + cell.changes
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_scores(place: Place) -> dict[Cell, Any]:
    """The newest line of each cell; those of another recipe or another base do not count."""
    if not place.scores.is_file():
        return {}
    lines = [json.loads(line) for line in place.scores.read_text().splitlines()]
    bases = {name: base_digest(task.recipe.model) for name, task in TASKS.items()}
    found = {Cell(**line["cell"]): line for line in lines if line["base"] == bases[line["cell"]["task"]]}
    return {cell: line for cell, line in found.items() if line["recipe"] == recipe(cell, place)}


def base_digest(model: Path | str) -> str:
    """Which base a line is of."""
    if isinstance(model, str):
        return model
    with (model / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def sequence_of(cell: Cell) -> list[tuple[str, float]]:
    how = TASKS[cell.task].recipe
    of_few = SEQUENCES_OF_FEW if cell.demonstrations <= how.few else {}
    others = SEQUENCES_OF_MANY if cell.demonstrations >= MANY else how.sequences | of_few
    return others.get(cell.sequence, SEQUENCES[cell.sequence])


def run_file(cell: Cell, place: Place, sequence: list[tuple[str, float]]) -> str:
    task = TASKS[cell.task]
    how = task.recipe
    texts = []
    for index, (name, share) in enumerate(sequence):
        steps = max(1, round(how.updates[name] * share * place.updates))
        epochs = max(1, steps * how.batch // cell.demonstrations)
        filled = how.stages[name].format(
            steps=steps,
            epochs=epochs,
            batch=how.batch,
            step_tokens=task.step_tokens,
            tokens=task.tokens,
            index=index,
        )
        texts.append(f"[[stages]]\n{filled}\n")
    think = "think = true\n" if thinks(cell.task, sequence) else ""
    params = ", ".join(f"{name} = {json.dumps(value)}" for name, value in task.params.items())
    return f"""name = "{cell.name}"
seed = {cell.seed}
{think}checkpoint_every = 1000

{how.setting}
[learner]
threads = 1

[verifier]
workers = 1

[[data]]
family = "{task.family}"
params = {{ {params} }}
train = {cell.demonstrations}
dev = {place.dev}
held_out = {place.held_out}

{"".join(texts)}
[evaluation]
max_tokens = {task.tokens}
every = {how.every}
on_stages = false

[tracking]
mlflow = false
"""


def thinks(task: str, sequence: list[tuple[str, float]]) -> bool:
    return TASKS[task].recipe.think and (not sequence or sequence[0][0] != "sft")


def score(model: Path | str, examples: Any, cell: Cell, samples: int = 0) -> dict[str, Any]:
    """Of each problem: whether it was solved greedily, tokens of that answer, and how many of `samples` solved it."""
    from srl_rlvr import trained
    from srl_rlvr.cli import inference, session
    from srl_rlvr.engines import SamplingSpec
    from srl_rlvr.policies import base_models
    from srl_rlvr.records import PASSED
    from srl_rlvr.stages import rlvr

    tokens, think = TASKS[cell.task].tokens, thinks(cell.task, sequence_of(cell))
    read = trained.read(base_models.resolve(str(model), session.model_cache()), 512, tokens)
    with inference.open_model(read, "transformers") as opened:
        prompts = rlvr.prompts(examples, opened.tokenizer, "evaluation", think)
        greedy, verdicts, _ = opened.sample(prompts, SamplingSpec(1, 0.0, tokens))
        found = {
            "greedy": (verdicts["reward"].to_numpy() >= PASSED).astype(int).tolist(),
            "tokens": [len(ids) for ids in greedy["token_ids"].to_pylist()],
        }
        if samples:
            asked = prompts.slice(0, SAMPLED)
            _, sampled, _ = opened.sample(asked, SamplingSpec(samples, 1.0, tokens, seed=cell.seed))
            passed = sampled["reward"].to_numpy().reshape(-1, samples) >= PASSED
            found["of_8"] = passed.sum(1).tolist()
    return found


def print_table(rows: dict[str, list[Any]]) -> None:
    """A line for each label, of the scores of its seeds."""
    width = max(map(len, rows), default=0)
    columns = ("seeds", "greedy", "95 %", "sampled", "pass@8", "longer", "tokens", "minutes")
    print(" " * width + "".join(f"{name:>10}" for name in columns))
    for label, of in rows.items():
        here = [s["here"] for s in of]
        solved = np.array([h["greedy"] for h in here], float)
        low, high = interval(solved, 1000)
        sampled = np.array([h["of_8"] for h in here])
        shown = (
            str(len(of)),
            f"{solved.mean():.1%}",
            f"{100 * low:.0f}-{100 * high:.0f}",
            f"{sampled.mean() / SAMPLES:.1%}",
            f"{(sampled > 0).mean():.1%}",
            f"{np.mean([s['longer']['greedy'] for s in of]):.1%}",
            f"{np.mean([h['tokens'] for h in here]):.0f}",
            f"{np.mean([s['minutes'] for s in of]):.1f}",
        )
        print(f"{label:<{width}}" + "".join(f"{text:>10}" for text in shown))


def plot(found: dict[Cell, Any], path: Path) -> None:
    """Greedy pass rate against demonstrations, a line for each sequence, of each task with several columns."""
    trained = {cell.task for cell in found if SEQUENCES[cell.sequence]}
    tasks = [name for name, task in TASKS.items() if len(task.demonstrations) > 1 and name in trained]
    if not tasks:
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "paper_table"  # the same plot is the same file
    from matplotlib import pyplot

    lines = -(-len(tasks) // 2)
    figure, panels = pyplot.subplots(lines, 2, figsize=(12, 4 * lines), squeeze=False)
    for axes in panels.flat[len(tasks) :]:
        axes.remove()
    style = {sequence: f"C{index % 10}{'--' if index > 9 else '-'}" for index, sequence in enumerate(SEQUENCES)}
    for task, axes in zip(tasks, panels.flat, strict=False):
        for sequence, stages_of in SEQUENCES.items():
            of: dict[int, list[float]] = {}
            for cell, scores in found.items():
                if (cell.task, cell.sequence) == (task, sequence):
                    of.setdefault(cell.demonstrations, []).append(float(np.mean(scores["here"]["greedy"])))
            if of and stages_of:
                means = [100 * np.mean(of[n]) for n in sorted(of)]
                axes.plot(sorted(of), means, style[sequence], marker="o", label=sequence)
        axes.set(xscale="log", xlabel=f"demonstrations ({task})", ylabel="held-out problems solved greedily, %")
        axes.set_xticks(TASKS[task].demonstrations, map(str, TASKS[task].demonstrations))
        axes.minorticks_off()
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def base_pass8(found: dict[Cell, Any]) -> float | None:
    """Of the task that the small base solves most of."""
    of: dict[str, list[np.ndarray]] = {}
    for cell, scores in found.items():
        if not SEQUENCES[cell.sequence] and isinstance(TASKS[cell.task].recipe.model, Path):
            of.setdefault(cell.task, []).append(np.array(scores["here"]["of_8"]) > 0)
    return round(max(float(np.mean(solved)) for solved in of.values()), 4) if of else None


def print_leads(found: dict[Cell, Any]) -> dict[str, float | None]:
    """A line for each model and number of demonstrations; the lower bounds by name."""
    small = [name for name, task in TASKS.items() if isinstance(task.recipe.model, Path)]
    parts = {"as shown": ["here"], "longer": ["longer"], "both": ["here", "longer"]}
    figures: dict[str, float | None] = {}
    print("\nlead of the best sequence with SRL over the best without, points (95 %)")
    print(f"{'':<24}" + "".join(f"{name:>22}" for name in parts))
    for prefix, tasks, demonstrations in (("", small, 16), ("", small, 64), ("smollm2_", ["smollm2_sums"], 16)):
        line = f"{prefix.rstrip('_') or 'small base':<16}{demonstrations:>4}    "
        for name, of in parts.items():
            bounds = lead(found, tasks, demonstrations, of)
            shown = "{1:+.1f} ({0:+.1f} to {2:+.1f})".format(*(100 * bound for bound in bounds)) if bounds else "-"
            line += f"{shown:>22}"
            suffix = "" if name == "as shown" else f"_{name}"
            figures[f"{prefix}lead_low_{demonstrations}{suffix}"] = round(bounds[0], 4) if bounds else None
        print(line)
    return figures


def lead(
    found: dict[Cell, Any], tasks: Sequence[str], demonstrations: int, parts: Sequence[str]
) -> tuple[float, float, float] | None:
    """(lower, mean, upper) of the 95 % interval of the lead of the best sequence with SRL over the best without, on
    the problems of these `parts` of the scores; the mean over those of `tasks` that are comparable."""
    of_tasks = [run for name in tasks if (run := comparable(found, name, demonstrations, parts))]
    if not of_tasks:
        return None
    return bootstrap(of_tasks, best_lead)


def bootstrap(
    of_tasks: Sequence[dict[str, np.ndarray[Any, Any]]], figure: Callable[[dict[str, float]], float]
) -> tuple[float, float, float]:
    """(lower, mean, upper) of the 95 % interval of `figure`, which is of the means of a task's sequences, averaged over
    tasks; of each task: [seeds, problems] by sequence. Each task draws for itself: drawn alike, seed 1 of one would
    always come with seed 1 of another, and the interval would be of how seeds are numbered."""

    def of_means(rows: dict[str, np.ndarray[Any, Any]], draw: Any = ...) -> float:
        return figure({name: float(values[draw].mean()) for name, values in rows.items()})

    drawn = [
        [of_means(rows, draw) for draw in draws(next(iter(rows.values())).shape, DRAWS, number)]
        for number, rows in enumerate(of_tasks)
    ]
    low, high = np.quantile(np.mean(drawn, axis=0), (0.025, 0.975))
    return float(low), float(np.mean([of_means(rows) for rows in of_tasks])), float(high)


def comparable(
    found: dict[Cell, Any], task: str, demonstrations: int, parts: Sequence[str]
) -> dict[str, np.ndarray[Any, Any]]:
    """Solved or not [seeds, problems], by sequence, of those that have run all seeds of SFT. Nothing while a sequence
    without SRL has not: the lead over the others would be too large."""
    of: dict[str, dict[int, list[int]]] = {}
    for cell, scores in found.items():
        if (cell.task, cell.demonstrations) == (task, demonstrations):
            of.setdefault(cell.sequence, {})[cell.seed] = [n for part in parts for n in scores[part]["greedy"]]
    seeds = sorted(of.get("sft", {}))
    run = {name: np.array([of[name][seed] for seed in seeds], float) for name in of if of[name].keys() >= set(seeds)}
    trained = [name for name in TASKS[task].sequences if SEQUENCES[name]]
    ready = {name: run[name] for name in trained if name in run}
    rivals = {name for name in trained if "srl" not in name}
    return ready if rivals < ready.keys() else {}


def best_lead(means: dict[str, float]) -> float:
    with_srl = max(mean for name, mean in means.items() if "srl" in name)
    return with_srl - max(mean for name, mean in means.items() if "srl" not in name)


def interval(values: np.ndarray[Any, Any], count: int = DRAWS) -> tuple[float, float]:
    """95 % of the mean of `values` [seeds, problems]."""
    low, high = np.quantile([values[draw].mean() for draw in draws(values.shape, count)], (0.025, 0.975))
    return float(low), float(high)


def draws(shape: tuple[int, ...], count: int, number: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which seeds and, of each, which problems; others for another `number`."""
    draw = np.random.default_rng(number)
    seeds, problems = shape
    return [(draw.integers(seeds, size=(seeds, 1)), draw.integers(problems, size=shape)) for _ in range(count)]


if __name__ == "__main__":
    main()
