"""Model types on real data, against what their user would otherwise do in an afternoon: so far those that rank.

    python benchmarks/seven_types.py                 every cell that has no score yet, then the table
    python benchmarks/seven_types.py --quick         one rival of each kind, and ours, of a few updates: it works
    python benchmarks/seven_types.py --table         only the table, of the scores that are there
    python benchmarks/seven_types.py --only reranker    cells whose names begin so

A cell is (type, data, sequence, seed): a run of `srl-rlvr train`, or a rival trained on the same rows (`_rivals.py`),
and its score on every question of the data's dev split, of the candidates that the data names. SFT is a sequence as
any other: ListMLE, which with one pick is cross-entropy. Data lies in `../shared/data` beside the project. Two cells
run at once, each on one core; runs lie in `out/seven_types/`, scores are lines of `benchmarks/seven_types.jsonl`.

The lead is that of SRL → RLVR over the best rival, paired by question and bootstrapped over seeds and questions; the
rival is chosen anew in each draw.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _rivals
import numpy as np
import paper_table as table
from _machine import commit, machine

HERE = Path(__file__).parent
OUT = HERE.parent / "out" / "seven_types"
DATA = HERE.parents[1] / "shared" / "data"
OURS = "srl-rlvr"


@dataclass(frozen=True)
class Task:
    model_type: str
    data: str
    rows: int  # of its train file
    rivals: tuple[str, ...]  # of _rivals
    max_context: int
    batch: int
    updates: int  # of SFT; SRL and RLVR encode each text once more, to sample, and have two thirds of them
    picks: int
    dev: int
    candidates: int = 8
    learning_rate: float = 5e-5

    @property
    def name(self) -> str:
        return f"{self.model_type}-{self.data}"


def router(data: str, rows: int) -> Task:
    return Task("intent_router", data, rows, ("logistic",), 64, 64, 150, picks=1, dev=300, learning_rate=1e-4)


TASKS = [
    router("banking77", 9178),
    Task("embeddings", "scifact", 705, ("mnrl",), 128, 32, 90, picks=10, dev=60, candidates=2),
    Task("reranker", "selqa", 1507, ("bce", "lambda"), 128, 16, 90, picks=10, dev=100, candidates=8),
    router("clinc150", 15039),
    router("hwu64", 8955),
    Task("embeddings", "covidqa", 711, ("mnrl",), 192, 32, 60, picks=10, dev=60, candidates=2),
    Task("reranker", "scifact", 705, ("bce", "lambda"), 192, 8, 90, picks=10, dev=60, candidates=8),
]


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
    folder = OUT.with_name("seven_types_quick") if options.quick else OUT
    place = table.Place(folder, folder / "scores.jsonl" if options.quick else HERE / "seven_types.jsonl")
    cells = [
        Cell(task.name, sequence, seed)
        for seed in range(options.seeds)
        for task in (TASKS[:3] if options.quick else TASKS)
        for sequence in ("base", "sft", *task.rivals, OURS)
    ]
    cells = [cell for cell in cells if cell.name.startswith(options.only)]
    if options.cell:
        run(next(cell for cell in cells if cell.name == options.cell), place, options)
        return
    if not options.table:
        done = read(place)
        table.in_processes(__file__, [cell for cell in cells if cell not in done], place, options)
    found = read(place)
    figures = report({cell: found[cell] for cell in cells if cell in found})
    print(json.dumps({"benchmark": "seven_types", "figures": figures, "machine": machine(), "commit": commit()}))


def run(cell: Cell, place: table.Place, options: argparse.Namespace) -> None:
    """Train and score one cell, and write its line."""
    import torch

    from srl_rlvr import config as configs
    from srl_rlvr import model_types
    from srl_rlvr.cli import session
    from srl_rlvr.examples import sources
    from srl_rlvr.examples.files import Reading
    from srl_rlvr.policies import base_models

    torch.set_num_threads(1)  # two cells run at once
    task = next(task for task in TASKS if task.name == cell.task)
    folder, share = place.out / cell.name, 0.02 if options.quick else 1.0
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(run_file(task, cell, share))
    config = configs.load(folder / "run.toml")
    train, dev, _ = sources.load_all(config.data, cell.seed, task.model_type)
    limit = 40 if options.quick else None
    held_out = model_types.find(task.model_type).load(DATA / task.data, "dev", Reading(limit))
    base = base_models.resolve("all-minilm-l6-v2", session.model_cache())
    model, steps, began = folder / "model", steps_of(task, share), time.monotonic()
    details: dict[str, float] = {"peak_memory_gib": 0.0}
    if cell.sequence == "logistic":
        scores, metrics = _rivals.logistic(task, train.to_pylist(), base, dev.to_pylist(), held_out.to_pylist())
        details["minutes"] = round((time.monotonic() - began) / 60, 2)
    elif cell.sequence == "base" and task.model_type == "reranker":
        scores, metrics = as_given(held_out.to_pylist())
    else:
        if cell.sequence in ("sft", OURS):
            session.train(config, folder / "run", resume=True, command=cell.name)
            model = folder / "run" / "model"
            details["peak_memory_gib"] = json.loads((folder / "run" / "result.json").read_text())["peak_memory_gib"]
        elif cell.sequence == "base":
            shutil.copytree(base, model, dirs_exist_ok=True)
        else:
            _rivals.TRAINERS[cell.sequence](task, train.to_pylist(), base, model, steps, cell.seed)
        if not (model / "model_card.json").is_file():
            (model / "model_card.json").write_text(json.dumps({"model_type": task.model_type}))
        details["minutes"] = round((time.monotonic() - began) / 60, 2)
        scores, metrics = score(model, task, held_out)
    line = {"cell": asdict(cell), "scores": scores, "metrics": metrics, "minutes": 0.0, **details}
    with place.scores.open("a") as file:
        file.write(json.dumps(line | {"commit": commit(), "machine": machine()["cpu"]}) + "\n")


def steps_of(task: Task, share: float) -> int:
    return max(1, round(task.updates * share))


def score(model: Path, task: Task, held_out: Any) -> tuple[list[float], dict[str, float]]:
    """Of each question, and the metrics of the type."""
    from srl_rlvr import pipeline
    from srl_rlvr.cli import inference

    options = Namespace(
        model=str(model), limit=None, engine="auto", max_tokens=task.picks, max_context=task.max_context
    )
    model_type, card = inference.declared(options)
    with inference.open_model(options) as opened:
        scores, predictions = pipeline.evaluate(held_out, opened.tokenizer, opened, False, task.picks)
    return [round(score, 4) for score in scores], model_type.metrics(predictions, card)


def as_given(questions: list[dict[str, Any]]) -> tuple[list[float], dict[str, float]]:
    """Of the order in which the data has the candidates."""
    from srl_rlvr.verifiers.orderings import ndcg

    found = [
        ndcg(" ".join(map(str, range(len(q["candidates"])))), q["reference"], json.loads(q["metadata"]))
        for q in questions
    ]
    names = found[0].components
    return [each.reward for each in found], {n: float(np.mean([each.components[n] for each in found])) for n in names}


def run_file(task: Task, cell: Cell, share: float) -> str:
    steps, rows = steps_of(task, share), task.rows - task.dev
    groups = f"prompts_per_step = {task.batch}\ngroup_size = 16\nmax_refills = 0"
    stages = {
        "sft": f'[[stages]]\nkind = "sft"\nlearning_rate = {task.learning_rate}\nbatch_size = {task.batch}\n'
        f"epochs = {max(1, round(steps * task.batch / rows))}",
        OURS: f'[[stages]]\nkind = "srl"\nlearning_rate = {task.learning_rate}\nsteps = {max(1, steps // 2)}\n'
        f'expert_in_group = true\n{groups}\n\n[[stages]]\nkind = "rlvr"\nlearning_rate = {task.learning_rate / 3:.2g}\n'
        f"steps = {max(1, steps // 6)}\nmax_tokens = {task.picks}\n{groups}",
    }[cell.sequence if cell.sequence == OURS else "sft"]
    return f"""name = "{task.name}"
model_type = "{task.model_type}"
seed = {cell.seed}
checkpoint_every = 1000

[model]
max_context = {task.max_context}

[[data]]
path = "{DATA / task.data}"
train = {min(rows, steps * task.batch)}
dev = {task.dev}
held_out = {20 if share < 1 else 100}
candidates = {task.candidates}

{stages}

[evaluation]
max_tokens = {task.picks}
every = 15
on_stages = false

[learner]
threads = 1
tokens_per_microbatch = 4096

[engine]
threads = 1

[verifier]
workers = 1

[tracking]
mlflow = false
"""


def read(place: table.Place) -> dict[Cell, Any]:
    """The newest line of each cell."""
    if not place.scores.is_file():
        return {}
    lines = [json.loads(line) for line in place.scores.read_text().splitlines()]
    return {Cell(**line["cell"]): line for line in lines}


def report(found: dict[Cell, Any]) -> dict[str, float]:
    """A line for each sequence; the figures of each type: means over its data, of those that ours has run."""
    of: dict[str, dict[str, list[Any]]] = {}
    for cell, line in found.items():
        of.setdefault(cell.task, {}).setdefault(cell.sequence, []).append(line)
    print(f"{'':<26}{'sequence':<12}{'seeds':>6}{'score':>8}{'minutes':>9}{'GiB':>6}  others")
    for name, sequences in of.items():
        for sequence, lines in sequences.items():
            shown = (f"{np.mean([line[what] for line in lines]):.1f}" for what in ("minutes", "peak_memory_gib"))
            minutes, memory = shown
            mean = np.mean([line["scores"] for line in lines])
            others = {key: np.mean([line["metrics"][key] for line in lines]) for key in lines[0]["metrics"]}
            rest = " ".join(f"{key} {value:.3f}" for key, value in others.items())
            print(f"{name:<26}{sequence:<12}{len(lines):>6}{mean:>8.3f}{minutes:>9}{memory:>6}  {rest}")
    figures: dict[str, float] = {}
    for model_type in dict.fromkeys(task.model_type for task in TASKS):
        names = [task.name for task in TASKS if task.model_type == model_type and OURS in of.get(task.name, {})]
        solved = [
            {sequence: np.array([line["scores"] for line in lines]) for sequence, lines in of[name].items()}
            for name in names
        ]
        solved = [rows for rows in solved if len({of_sequence.shape for of_sequence in rows.values()}) == 1]
        if solved:
            figures |= {f"{model_type}_{key}": value for key, value in lead(solved).items()}
    return figures


def lead(solved: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Of SRL → RLVR: its score, the best rival's, and the lower 95 % bound of its lead."""

    def means(rows: dict[str, np.ndarray], draw: Any = ...) -> tuple[float, float]:
        of = {sequence: float(values[draw].mean()) for sequence, values in rows.items()}
        return of.pop(OURS), max(of.values())

    at = [means(rows) for rows in solved]
    gaps = [
        [ours - rival for draw in table.draws(rows[OURS].shape, 4000) for ours, rival in [means(rows, draw)]]
        for rows in solved
    ]
    ours, rival = np.mean(at, axis=0)
    low = np.quantile(np.mean(gaps, axis=0), 0.025)
    return {"score": round(float(ours), 4), "rival": round(float(rival), 4), "lead_low": round(float(low), 4)}


if __name__ == "__main__":
    main()
