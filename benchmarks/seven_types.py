"""Model types on real data, against what their user would otherwise do in an afternoon: those that rank, and those that
write text, with images before it or without.

    python benchmarks/seven_types.py                 every cell that has no score yet, then the table
    python benchmarks/seven_types.py --quick         one type that ranks, one that writes, of an update or two: it works
    python benchmarks/seven_types.py --table         only the table, of the scores that are there
    python benchmarks/seven_types.py --only reranker    cells whose names begin so

A cell is (type, data, sequence, seed): a run of `srl-rlvr train`, or a rival trained on the same rows (`_rivals.py`),
and its score on questions of the data's dev split. Data lies in `../shared/data` beside the project. Two cells run at
once, each on one core; runs lie in `out/seven_types/`, scores are lines of `benchmarks/seven_types.jsonl`.

Types that rank start from all-MiniLM-L6-v2 and are asked every question, of the candidates that the data names. SFT is
a sequence as any other: ListMLE, which with one pick is cross-entropy. A reranker of SciFact begins with the order of
BM25 (`data.ordered`), in ours and in SFT; sentence-transformers' trainers have no such thing.

Types that write start from SmolLM2-135M-Instruct, with LoRA, and answer at most 200 questions greedily. The score is
accuracy, or F1 where the answer is JSON. A cell is to take twenty minutes, in which SFT sees each row four times, so
there are few rows; those whose question or answer is too long for that are left out, of training and of the questions,
and what is left is easier; so are rows whose answer is empty, the first thing that RLVR finds. What is left is, of
train and of dev in percent: svamp 99 and 99, propbank_ewt 40 and 48, wnut17 36 and 62, crossner 89 and 86, sroie_json
61 and 79, gsm8k 57 and 59. Files are sorted by domain, so the order of their rows is drawn, once for all cells.

The type that sees starts from a small tower and a small Llama, newly drawn, so that its SFT is the supervised training
of the same network. Omniglot's tower has seen its images before, without a label (SimCLR). It answers every question.

Ours is SFT for three fifths of the time, half of it for types that write, four fifths for embedders and for the type
that sees; then SRL and RLVR at lower rates. Sequences have about the same minutes. Rows of the data that are wrong are
left out, of training and of the questions (one question of covidqa has no candidate).

The lead is that of SRL → RLVR over the best rival, paired by question and bootstrapped over seeds and questions; the
rival is chosen anew in each draw. The same on half of the rows, in the same time, is shown beside it and is no rival.
Tables are Markdown, as docs/results.md has them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import _rivals
import numpy as np
import paper_table as table
from _machine import commit, machine, tell

from srl_rlvr import model_types

HERE = Path(__file__).parent
OUT = HERE.parent / "out" / "seven_types"
DATA = HERE.parents[1] / "shared" / "data"
OURS = "srl-rlvr"
HALF = "srl-rlvr-half"  # ours on half of the rows, in the same time
VISION = "multimodal_vision"
HELD_OUT = 200  # questions of a type that writes, at most
EMPTY = ("[]", "{}")  # answers with nothing in them
RIVALS = {  # by `_rivals`, as the table names them
    "logistic": "logistic regression on embeddings",
    "mnrl": "sentence-transformers, MultipleNegativesRanking ({})",
    "bce": "sentence-transformers, binary cross-entropy ({})",
    "lambda": "sentence-transformers, LambdaLoss ({})",
}
FIGURES = ("score", "rival", "lead_low")  # of each type
EPOCHS = 4  # of SFT, where the policy writes


@dataclass(frozen=True)
class Recipe:
    """What the tasks of a type, or of a policy, have in common."""

    rates: dict[str, float]  # of a stage, by the task's
    shares: dict[str, float]  # of ours, of the time
    group_size: int
    srl_group_size: int  # with as many samples in all
    lora_rank: int
    tokens_per_microbatch: int


RECIPES = {
    "ranking": Recipe(
        {"sft": 1.0, "srl": 0.5, "rlvr": 0.3},
        {"sft": 0.6, "srl": 0.2, "rlvr": 0.2},
        group_size=16,
        srl_group_size=16,
        lora_rank=0,
        tokens_per_microbatch=4096,
    ),
    "multimodal_vision": Recipe(
        {"sft": 1.0, "srl": 0.3, "rlvr": 0.2},
        {"sft": 0.8, "srl": 0.1, "rlvr": 0.1},
        group_size=8,
        srl_group_size=8,
        lora_rank=0,
        tokens_per_microbatch=2048,
    ),
    "text": Recipe(
        {"sft": 1.0, "srl": 0.3, "rlvr": 0.2},
        {"sft": 0.5, "srl": 0.25, "rlvr": 0.25},
        group_size=8,
        srl_group_size=4,
        lora_rank=16,
        tokens_per_microbatch=448,
    ),
}
# A whole batch: what does not fit is encoded twice. With three fifths for SFT, dev of covidqa fell in what follows it.
RECIPES["embeddings"] = replace(
    RECIPES["ranking"], shares={"sft": 0.8, "srl": 0.1, "rlvr": 0.1}, tokens_per_microbatch=24576
)
# A minute of RLVR brings it further than one of SFT, and one of SRL nowhere.
RECIPES["srl_parser"] = replace(RECIPES["text"], shares={"sft": 0.5, "srl": 0.05, "rlvr": 0.45})


@dataclass(frozen=True)
class Task:
    model_type: str
    data: str
    rows: int  # of its train file, or so many of those that fit
    rivals: tuple[str, ...]  # of _rivals, or sequences beside SFT
    max_context: int
    batch: int
    updates: tuple[int, int, int]  # of SFT, of SRL and of RLVR, that take about as long as each other
    longest: int  # answer: picks, or tokens
    dev: int
    every: int = 15  # updates between two looks at the dev problems
    candidates: int = 8
    learning_rate: float = 5e-5
    problems: int = 0  # of an update of SRL and RLVR, where they are not a batch
    dev_candidates: int = 0  # where they are not as many as in training
    side: int = 64  # of the tower's images, in pixels
    patch: int = 8
    epochs: int = 0  # in which the tower has seen the data's images before
    ordered: bool = False  # the candidates' order is that of a search, and counts
    hardest: int = 0  # of the candidates that are wrong, those that each stage's first policy ranks highest

    @property
    def name(self) -> str:
        return f"{self.model_type}-{self.data}"

    @property
    def drawn(self) -> str:
        """Folder of a base that is newly drawn."""
        tower = self.side, self.patch, self.epochs
        return "base" if tower == (64, 8, 0) else "base-" + "-".join(map(str, tower))

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.model_type if self.model_type in RECIPES else model_types.find(self.model_type).policy]

    @property
    def writes(self) -> bool:
        return self.model_type != VISION and model_types.find(self.model_type).policy == "text"

    def shares(self, sequence: str) -> dict[str, float]:
        """The stages of a sequence, and their share of the time."""
        if sequence in (OURS, HALF):
            return self.recipe.shares
        return {"rlvr" if sequence == "rlvr" else "sft": 1.0}

    def steps(self, stage: str, share: float) -> int:
        """Updates of a stage that has this share of the time."""
        return max(1, round(self.updates[("sft", "srl", "rlvr").index(stage)] * share))

    def training_rows(self, sequence: str, updates: float = 1) -> int:
        rows = min(self.rows - self.dev, self.steps("sft", updates) * self.batch)
        return rows // 2 if sequence == HALF else rows

    def epochs_of_sft(self, steps: int, rows: int) -> int:
        """Whole ones, of about so many updates."""
        return max(1, round(steps * self.batch / rows))


def ranking(updates: int) -> tuple[int, int, int]:
    """SRL and RLVR encode each text once more, to sample, and have two thirds."""
    return updates, 2 * updates // 3, 2 * updates // 3


def router(data: str, rows: int) -> Task:
    """After SFT it has nearly all problems right, so that of 64 only three to six tell anything; it takes 256."""
    return Task(
        "intent_router", data, rows, ("logistic",), 64, 64, ranking(360), 1, dev=300, every=30,
        learning_rate=2e-4, problems=256,
    )  # fmt: skip


def embedder(data: str, rows: int, max_context: int, updates: int) -> Task:
    """Of two documents and those of the others, dev has nearly all right after 15 updates: it is asked with ten, and
    each stage goes on with the one of four wrong documents that it ranks highest at its start."""
    return Task(
        "embeddings", data, rows, ("mnrl",), max_context, 32, ranking(updates), 10, dev=60, every=20, candidates=5,
        dev_candidates=10, hardest=1,
    )  # fmt: skip


def writer(
    model_type: str, data: str, max_context: int, batch: int, updates: tuple[int, int, int], longest: int, dev: int = 48
) -> Task:
    """SFT sees dev ten times on its way."""
    rows, rivals = updates[0] * batch // EPOCHS + dev, ("rlvr",) if model_type == "task_llm" else ()
    every = updates[0] // 10
    return Task(model_type, data, rows, rivals, max_context, batch, updates, longest, dev, every, learning_rate=5e-4)


def vision(data: str, rows: int, longest: int, updates: int, dev: int, **tower: Any) -> Task:
    """SRL and RLVR encode each image twice more, and have half."""
    steps = updates, updates // 2, updates // 2
    return Task(VISION, data, rows, (), 256, 32, steps, longest, dev=dev, learning_rate=5e-4, **tower)


TASKS = {
    task.name: task
    for task in (
        router("banking77", 9178),
        embedder("scifact", 705, 128, 120),
        Task("reranker", "selqa", 1507, ("bce", "lambda"), 128, 16, ranking(90), 10, dev=100, candidates=8),
        writer("extractor", "wnut17", 208, 8, (140, 92, 68), longest=40),
        writer("task_llm", "svamp", 160, 8, (140, 48, 32), longest=48),
        writer("srl_parser", "propbank_ewt", 192, 4, (300, 48, 32), longest=96),
        vision("clothing", 3068, 16, 300, dev=150),
        vision("bccd", 205, 32, 200, dev=40),
        router("clinc150", 15039),
        router("hwu64", 8955),
        embedder("covidqa", 711, 192, 80),
        replace(
            Task("reranker", "scifact", 705, ("bce", "lambda"), 128, 8, ranking(135), 10, dev=60, every=27),
            dev_candidates=20,
            ordered=True,
        ),
        writer("extractor", "crossner", 320, 4, (160, 48, 32), longest=72),
        writer("extractor", "sroie_json", 640, 4, (50, 36, 14), longest=112, dev=16),
        writer("task_llm", "gsm8k", 224, 8, (110, 48, 20), longest=96),
        vision("omniglot", 3294, 32, 400, dev=150, patch=16, epochs=7),
        vision("nlvr", 3956, 88, 250, dev=150, side=128, patch=16),
    )
}
QUICK = {"task_llm-svamp": (OURS, "base"), "intent_router-banking77": (OURS, "logistic")}


@dataclass(frozen=True)
class Cell:
    task: str
    sequence: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.sequence}-{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", default="", metavar="PREFIX")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = OUT.with_name("seven_types_quick")
    place = table.Place(OUT, HERE / "seven_types.jsonl", held_out=100_000)
    if options.quick:
        place = table.Place(folder, folder / "scores.jsonl", held_out=8, updates=0.01)
    cells = [
        Cell(task.name, sequence, seed)
        for seed in range(options.seeds)
        for task in TASKS.values()
        for sequence in ("base", "sft", *task.rivals, OURS, HALF)
    ]
    if options.cell:
        run(next(cell for cell in cells if cell.name == options.cell), place)
        return
    if options.quick:
        cells = [Cell(task, sequences[turn], 0) for turn in (0, 1) for task, sequences in QUICK.items()]
    cells = [cell for cell in cells if cell.name.startswith(options.only)]
    if not options.table:
        table.begin_anew(place, options.quick)
        done = read(place)
        table.in_processes(__file__, [cell for cell in cells if cell not in done], place, options)
    found = read(place)
    kinds = dict.fromkeys(task.model_type for task in TASKS.values())
    figures: dict[str, float | None] = {f"{kind}_{key}": None for kind in kinds for key in FIGURES}
    figures |= report({cell: found[cell] for cell in cells if cell in found})
    tell("seven_types", figures, whole=not (options.quick or options.only))


def run(cell: Cell, place: table.Place) -> None:
    """Train and score one cell, and write its line."""
    import torch

    from srl_rlvr import config as configs
    from srl_rlvr.cli import session
    from srl_rlvr.examples import sources
    from srl_rlvr.examples.files import Reading
    from srl_rlvr.policies import base_models

    torch.set_num_threads(1)  # two cells run at once
    task = TASKS[cell.task]
    if place.updates < 1:
        task = replace(task, batch=4, longest=min(task.longest, 16), dev=4)
    model_type, folder = model_types.find(task.model_type), place.out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    base = vision_base_of(task, folder) if task.model_type == VISION else model_type.base
    base = base_models.resolve(str(base), session.model_cache())
    data = fitting(task, base, folder) if task.writes else DATA / task.data
    (folder / "run.toml").write_text(run_file(task, cell, place, data, base))
    config = configs.load(folder / "run.toml")
    train, dev, _ = sources.load_all(config.data, cell.seed, task.model_type)
    ours = cell.sequence not in _rivals.TRAINERS
    how = Reading(place.held_out, ordered=task.ordered and ours, skip_bad=True)
    held_out = model_type.load(data, "dev", how)
    model, began = folder / "model", time.monotonic()
    minutes = memory = 0.0
    if cell.sequence == "logistic":
        scores, metrics = _rivals.logistic(task, train.to_pylist(), base, dev.to_pylist(), held_out.to_pylist())
        minutes, memory = (time.monotonic() - began) / 60, own_peak_memory()
    elif cell.sequence == "base" and task.model_type == "reranker":
        scores, metrics = as_given(held_out.to_pylist())
    else:
        if cell.sequence == "base":
            shutil.copytree(base, model, dirs_exist_ok=True)
        elif cell.sequence in _rivals.TRAINERS:
            steps = task.steps("sft", place.updates)
            _rivals.TRAINERS[cell.sequence](task, train.to_pylist(), base, model, steps, cell.seed)
            minutes, memory = (time.monotonic() - began) / 60, own_peak_memory()
        else:
            of_recipe = folder / f"run-{recipe(cell, place)}"
            session.train(config, of_recipe, resume=True, command=cell.name)
            model = of_recipe / "model"
            result = json.loads((of_recipe / "result.json").read_text())
            minutes, memory = result["minutes"], result["peak_memory_gib"]
        if not (model / "model_card.json").is_file():
            (model / "model_card.json").write_text(json.dumps({"model_type": task.model_type}))
        scores, metrics = score(model, task, held_out)
    line = {
        "cell": asdict(cell),
        "recipe": recipe(cell, place),
        "scores": scores,
        "metrics": metrics,
        "minutes": round(minutes, 2),
        "peak_memory_gib": round(memory, 2),
        "commit": commit(),
        "machine": machine()["cpu"],
    }
    with place.scores.open("a") as file:
        file.write(json.dumps(line) + "\n")


def own_peak_memory() -> float:
    """Of this process, in GiB: a rival trains in it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def vision_base_of(task: Task, folder: Path) -> Path:
    """A small tower, which may have seen the data's images, and a small Llama that knows nothing yet, with a tokenizer
    of the data's texts."""
    from srl_rlvr import vision_base

    base, data = folder / task.drawn, [DATA / task.data]
    if not base.is_dir():
        vision_base.build(
            base,
            texts=vision_base.texts_of(data),
            image_size=task.side,
            patch=task.patch,
            images=vision_base.images_of(data) if task.epochs else (),
            epochs=task.epochs,
        )
    return base


def fitting(task: Task, base: Path, folder: Path) -> Path:
    """A folder with the first rows of the data that have steps and fit the context, in an order drawn once."""
    from srl_rlvr.examples import files

    model_type, out = model_types.find(task.model_type), folder / task.data
    tokenizer = model_type.load_tokenizer(base, task.max_context)

    def fits(example: dict[str, Any]) -> bool:
        solution = model_type.encode_solution(tokenizer, example, think=False)
        answer = sum(map(len, solution.steps))
        return len(solution.prompt) + task.longest <= task.max_context and answer <= task.longest

    out.mkdir(exist_ok=True)
    wanted: dict[files.Split, int] = {"train": task.rows, "dev": HELD_OUT}
    for split, most in wanted.items():
        rows = dict(files.read_rows(files.find(DATA / task.data, split)))
        examples = model_type.load(DATA / task.data, split).to_pylist()
        found = [each for each in examples if each["steps"] and each["reference"] not in EMPTY and fits(each)]
        print(f"{task.name}: {len(found)} of {len(examples)} rows of {split} fit", flush=True)
        np.random.default_rng(0).shuffle(found)
        with (out / f"{split}.jsonl").open("w") as file:
            for example in found[:most]:
                schema = {name: of for name, of in json.loads(example["metadata"]).items() if name == "schema"}
                file.write(json.dumps(rows[json.loads(example["provenance"])["row"]] | schema) + "\n")
    return out


def score(model: Path, task: Task, held_out: Any) -> tuple[list[float], dict[str, float]]:
    """Of each question, and the metrics of the type."""
    from srl_rlvr import pipeline, trained
    from srl_rlvr.cli import inference

    read = trained.read(model, task.max_context, task.longest)
    with inference.open_model(read, "transformers") as opened:
        scores, predictions = pipeline.evaluate(held_out, opened.tokenizer, opened, False, task.longest)
    return [round(score, 4) for score in scores], read.model_type.metrics(pipeline.judged(predictions), read.card)


def as_given(questions: list[dict[str, Any]]) -> tuple[list[float], dict[str, float]]:
    """Of the order in which the data has the candidates."""
    from srl_rlvr.verifiers.orderings import ndcg

    found = [
        ndcg(" ".join(map(str, range(len(q["candidates"])))), q["reference"], json.loads(q["metadata"]))
        for q in questions
    ]
    names = found[0].components
    return [each.reward for each in found], {n: float(np.mean([each.components[n] for each in found])) for n in names}


def run_file(task: Task, cell: Cell, place: table.Place, data: Path, base: Path) -> str:
    recipe = task.recipe
    rows = task.training_rows(cell.sequence, place.updates)
    asked = f"dev_candidates = {task.dev_candidates}\n" if task.dev_candidates else ""
    asked += "ordered = true\n" if task.ordered else ""
    sequence = task.shares(cell.sequence)
    stages = [stage(kind, task, task.steps(kind, share * place.updates), rows) for kind, share in sequence.items()]
    return f"""name = "{task.name}"
model_type = "{task.model_type}"
seed = {cell.seed}
checkpoint_every = 1000

[model]
base = "{base}"
max_context = {task.max_context}
lora_rank = {recipe.lora_rank}

[[data]]
path = "{data}"
train = {rows}
dev = {task.dev}
held_out = 4
candidates = {task.candidates}
{asked}skip_bad = true

{"".join(stages)}
[evaluation]
max_tokens = {task.longest}
every = {task.every}
on_stages = false

[learner]
threads = 1
tokens_per_microbatch = {recipe.tokens_per_microbatch}

[engine]
kind = "transformers"
threads = 1

[verifier]
workers = 1

[tracking]
mlflow = false
"""


def stage(kind: str, task: Task, steps: int, rows: int) -> str:
    text = f'[[stages]]\nkind = "{kind}"\nlearning_rate = {task.learning_rate * task.recipe.rates[kind]:.2g}\n'
    text += f"hardest = {task.hardest}\n" if task.hardest else ""
    if kind == "sft":
        examples, epochs = min(rows, steps * task.batch), task.epochs_of_sft(steps, rows)
        return f"{text}batch_size = {task.batch}\nexamples = {examples}\nepochs = {epochs}\n"
    samples = (task.problems or task.batch) * task.recipe.group_size
    group_size = task.recipe.srl_group_size if kind == "srl" else task.recipe.group_size
    text += f"steps = {steps}\nprompts_per_step = {samples // group_size}\ngroup_size = {group_size}\n"
    text += f"max_tokens = {task.longest}\nmax_refills = 0\n"
    return text + ("expert_in_group = true\n" if kind == "srl" else "invalid_reward = -0.2\n")


def recipe(cell: Cell, place: table.Place) -> str:
    """Names how a cell is run."""
    task = TASKS[cell.task]
    text = run_file(task, cell, place, Path(task.data), Path(task.drawn)) + str(HELD_OUT)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(place: table.Place) -> dict[Cell, Any]:
    """The newest line of each cell; those of another recipe do not count."""
    if not place.scores.is_file():
        return {}
    lines = [json.loads(line) for line in place.scores.read_text().splitlines()]
    found = {Cell(**line["cell"]): line for line in lines}
    return {cell: line for cell, line in found.items() if line["recipe"] == recipe(cell, place)}


def report(found: dict[Cell, Any]) -> dict[str, float]:
    """Prints a table of the sequences and one of what ours has over its rivals. Returns the figures of each type: means
    over its data, of those that ours has run."""
    of: dict[str, dict[str, list[Any]]] = {}
    for cell, line in found.items():
        of.setdefault(cell.task, {}).setdefault(cell.sequence, []).append(line)
    kinds = dict.fromkeys(task.model_type for task in TASKS.values())
    tasks = [task for kind in kinds for task in TASKS.values() if task.model_type == kind and task.name in of]
    print("| type, data (questions) | sequence (updates) | seeds | score | 95 % | minutes | GiB | others |")
    print("|---|---|---|---|---|---|---|---|")
    solved: dict[str, dict[str, np.ndarray]] = {}
    for task in tasks:
        rows = {name: np.array([line["scores"] for line in lines]) for name, lines in of[task.name].items()}
        best = max(float(values.mean()) for values in rows.values())
        for name in sorted(rows, key=lambda name: -float(rows[name].mean())):
            print(row(task, name, of[task.name][name], rows[name], best))
        if OURS in rows and rows.keys() - {OURS, HALF} and len({values.shape for values in rows.values()}) == 1:
            solved[task.name] = rows
    print("\n| type, data | ours | best rival | lead | on half of the rows | lead |\n|---|---|---|---|---|---|")
    for name, rows in solved.items():
        leads = [lead([rows], ours) for ours in (OURS, HALF) if ours in rows]
        over = ["{lead:+.1%} ({lead_low:+.1%} to {lead_high:+.1%})".format(**at) for at in leads]
        first = name.replace("-", ", ", 1), f"{leads[0]['score']:.1%}", f"{leads[0]['rival']:.1%}", over[0]
        half = (f"{leads[1]['score']:.1%}", over[1]) if HALF in rows else ("–", "–")
        print(f"| {' | '.join((*first, *half))} |")
    figures: dict[str, float] = {}
    for kind in kinds:
        of_kind = [solved[task.name] for task in tasks if task.model_type == kind and task.name in solved]
        if of_kind:
            at = lead(of_kind, OURS)
            figures |= {f"{kind}_{key}": round(at[key], 4) for key in FIGURES}
    return figures


def row(task: Task, sequence: str, lines: list[Any], scores: np.ndarray, best: float) -> str:
    """Of the table of sequences; `scores` are [seeds, questions]."""
    low, mean, high = table.bootstrap([{"score": scores}], lambda of: of["score"])
    minutes, memory = (float(np.mean([line[key] for line in lines])) for key in ("minutes", "peak_memory_gib"))
    others = {key: np.mean([line["metrics"][key] for line in lines]) for key in lines[0]["metrics"]}
    columns = (
        f"{task.model_type}, {task.data} ({scores.shape[1]:,})",
        described(task, sequence),
        str(len(lines)),
        f"**{mean:.1%}**" if mean == best else f"{mean:.1%}",
        f"{100 * low:.0f} to {100 * high:.0f}",
        f"{minutes:.1f}" if minutes else "–",
        f"{memory:.1f}" if memory else "–",
        ", ".join(f"{key} {value:.2f}" for key, value in others.items() if abs(value - mean) > 1e-3),
    )
    return f"| {' | '.join(columns)} |"


def described(task: Task, sequence: str) -> str:
    """A sequence with its updates; a run has a few less where rows are wrong."""
    if sequence == "base":
        return {"reranker": "as given", VISION: "newly drawn"}.get(task.model_type, "base")
    if sequence in RIVALS:
        return RIVALS[sequence].format(task.steps("sft", 1))
    rows, stages = task.training_rows(sequence), []
    for kind, share in task.shares(sequence).items():
        steps = task.steps(kind, share)
        if kind == "sft":
            steps = math.ceil(min(rows, steps * task.batch) * task.epochs_of_sft(steps, rows) / task.batch)
        stages.append(f"{kind.upper()} ({steps})")
    return " → ".join(stages) + (", half of the rows" if sequence == HALF else "")


def lead(solved: list[dict[str, np.ndarray]], ours: str) -> dict[str, float]:
    """Of SRL → RLVR, or of it on half of the rows: its score, the best rival's, and its lead with 95 % bounds."""

    def best_rival(means: dict[str, float]) -> float:
        return max(mean for sequence, mean in means.items() if sequence not in (OURS, HALF))

    means = [{sequence: float(values.mean()) for sequence, values in rows.items()} for rows in solved]
    score, rival = (float(np.mean(values)) for values in ([of[ours] for of in means], list(map(best_rival, means))))
    low, _, high = table.bootstrap(solved, lambda of: of[ours] - best_rival(of))
    return {"score": score, "rival": rival, "lead": score - rival, "lead_low": low, "lead_high": high}


if __name__ == "__main__":
    main()
