"""Whole training steps: `srl-rlvr train` against TRL's GRPOTrainer, each in a process of its own, step by step in turn.

    python benchmarks/end_to_end.py            six steps of either side, RLVR and SRL; the first of each is dropped
    python benchmarks/end_to_end.py --quick    two steps on a random model of 4 million parameters: it works
    python benchmarks/end_to_end.py --task srl    one of the two only

RLVR: sums of two one-digit numbers, 8 problems × 8 samples of up to 64 tokens. SRL: word problems with six expert
steps, one problem × 6 steps × 8 samples of up to 60 tokens; TRL is given one row for each step, as one would make it do
SRL, and the line break as its end token. Same model (SmolLM2-135M-Instruct, fp32, all weights), prompts in the same
order, reward functions, group, temperature, clip range, learning rate, threads and allocator; TRL's other settings are
its defaults. A step is everything between two steps: sampling, verification, update, hand-over of weights. Groups whose
rewards are all alike have no gradient: ours leaves them out of the update, TRL computes them.
Prints the reward of every step of both sides, a table, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _machine import MODEL, import_trl, in_the_actors_environment, tell

LEARNING_RATE, CLIP_HIGH, BETAS = 1e-5, 0.28, (0.9, 0.99)
GROUP = 8
TASKS: dict[str, dict[str, int]] = {"rlvr": {"prompts": 8, "max_tokens": 64}, "srl": {"prompts": 6, "max_tokens": 60}}
SIDES = ("srl-rlvr", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", default=MODEL, help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=list(TASKS))
    options = parser.parse_args()
    steps, group = (2, 2) if options.quick else (6, GROUP)
    if options.side:
        in_the_actors_environment(options.quick)
        with tempfile.TemporaryDirectory() as folder:
            run = _run_ours if options.side == "srl-rlvr" else _run_trl
            engine, context = ("transformers", 1024) if options.quick else ("vllm", 512)
            run(Job(options.task, options.model, steps, group, engine, context), Path(folder))
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        model = _random_model(Path(folder) / "model") if options.quick else MODEL
        for task in [options.task] if options.task else TASKS:
            found = _in_turn(task, steps, ["--model", model, *(["--quick"] if options.quick else [])])
            figures[f"{task}_vs_trl"] = _report(task, found, group)
    tell("end_to_end", figures, whole=not (options.quick or options.task))


@dataclass(frozen=True)
class Job:
    """What both sides are to do."""

    task: str
    model: str
    steps: int
    group: int
    engine: str
    max_context: int

    @property
    def prompts(self) -> int:
        return TASKS[self.task]["prompts"]

    @property
    def max_tokens(self) -> int:
        return TASKS[self.task]["max_tokens"]


def _random_model(folder: Path) -> str:
    from srl_rlvr import small_base

    small_base.build(folder, families={"gsm_symbolic": {}}, problems=200, updates=1)
    return str(folder)


def _in_turn(task: str, steps: int, arguments: list[str]) -> dict[str, list[dict[str, float]]]:
    """Both sides start and wait; then each makes one step while the other waits."""
    command = [sys.executable, __file__, "--task", task, *arguments]
    children = {
        side: subprocess.Popen([*command, "--side", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for side in SIDES
    }
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    try:
        for child in children.values():
            _read(child)  # ready for its first step
        for _ in range(steps):
            for side, child in children.items():
                assert child.stdin is not None
                child.stdin.write("go\n")
                child.stdin.flush()
                found[side].append(_read(child))
                print(f"{task}, {side}: {found[side][-1]['seconds']:.1f} s", file=sys.stderr)
        for child in children.values():
            child.communicate("go\n" * steps)
    finally:
        for child in children.values():
            child.kill()
    return found


def _read(child: subprocess.Popen[str]) -> dict[str, float]:
    """The next message of a side; what else it prints is not for us."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("@"):
            return json.loads(line[1:])
    raise SystemExit("a side ended before its steps were done; run it alone with --task and --side")


def _report(task: str, found: dict[str, list[dict[str, float]]], group: int) -> float:
    samples = TASKS[task]["prompts"] * group
    medians = {side: statistics.median(step["seconds"] for step in steps[1:]) for side, steps in found.items()}
    print(f"\n{task}: {samples} samples a step")
    print(f"{'step':>4}" + "".join(f"{side + ' s':>12}{'reward':>8}" for side in SIDES))
    for i in range(len(found[SIDES[0]])):
        cells = "".join(f"{found[side][i]['seconds']:>12.1f}{found[side][i]['reward']:>8.3f}" for side in SIDES)
        print(f"{i + 1:>4}{cells}")
    for side in SIDES:
        print(f"{side:<9} {samples / medians[side]:6.2f} samples/s")
    return round(medians["trl"] / medians["srl-rlvr"], 2)


class Gate:
    """A step begins when the parent says so and ends with a message to it."""

    def __init__(self) -> None:
        self.began = 0.0

    def wait(self) -> None:
        sys.stdin.readline()
        self.began = time.perf_counter()

    def ready(self) -> None:
        self._tell({})

    def ended(self, reward: float) -> None:
        self._tell({"seconds": time.perf_counter() - self.began, "reward": reward})

    def _tell(self, message: dict[str, float]) -> None:
        print("@" + json.dumps(message), flush=True)


def _run_file(job: Job, folder: Path) -> Path:
    _write_problems(job.task, folder / "problems.jsonl")
    text = f"""
name = "end-to-end-{job.task}"
[model]
base = "{job.model}"
max_context = {job.max_context}
[engine]
kind = "{job.engine}"
[[data]]
path = "problems.jsonl"
held_out = 4
[[stages]]
kind = "{job.task}"
steps = {job.steps}
prompts_per_step = {job.prompts}
group_size = {job.group}
max_tokens = {job.max_tokens}
learning_rate = {LEARNING_RATE}
warmup_steps = 0
clip_high = {CLIP_HIGH}
max_refills = 0
[evaluation]
max_tokens = 8
[tracking]
mlflow = false
"""
    path = folder / "run.toml"
    path.write_text(text)
    return path


def _write_problems(task: str, path: Path) -> None:
    """RLVR: sums, of which the model solves a third. SRL: word problems of six steps, the last of them the answer."""
    from srl_rlvr.examples import generated

    if task == "rlvr":
        rows = generated.generate("chain_sum", 80, seed=0, params={"max_terms": 2, "max_digits": 1}).to_pylist()
    else:
        rows = [r for r in generated.generate("gsm_symbolic", 400, seed=0).to_pylist() if len(r["steps"]) == 5][:28]
    keys = {"question": "prompt", "answer": "reference", "steps": "steps"}
    lines = [json.dumps({key: row[of] for key, of in keys.items()} | {"verifier": "numeric"}) for row in rows]
    path.write_text("\n".join(lines) + "\n")


def _run_ours(job: Job, folder: Path) -> None:
    """The command itself; its progress display is where a step is known to end."""
    from srl_rlvr.cli import main as command
    from srl_rlvr.cli import session

    gate = Gate()

    class Turns(session.Progress):
        def stage(self, label: str, kind: str, steps: int) -> None:
            super().stage(label, kind, steps)
            gate.ready()
            gate.wait()

        def step(self, step: int, metrics: Any) -> None:
            super().step(step, metrics)
            gate.ended(metrics["reward"])
            gate.wait()

    session.Progress = Turns
    command(["train", str(_run_file(job, folder)), "--out", str(folder / "out")])


def _run_trl(job: Job, folder: Path) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback

    from srl_rlvr.cli.session import model_cache
    from srl_rlvr.policies import base_models
    from srl_rlvr.verifiers import find_verifier

    trl = import_trl()
    gate, rewards = Gate(), []
    model = base_models.resolve(job.model, model_cache())
    tokenizer = base_models.load_tokenizer(model)
    rows = _rows_in_our_order(job, folder, tokenizer)
    if job.task == "srl":  # a step ends with its line break
        tokenizer.eos_token_id = tokenizer.encode("\n", add_special_tokens=False)[0]
    network = base_models.load_model(model)
    network.generation_config.eos_token_id = tokenizer.eos_token_id

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Of what our own verifiers are given: the text with its line break, and whether it was cut off."""
        found = []
        for row, ids in enumerate(completion_ids):
            name, reference, metadata = (columns[key][row] for key in ("verifier", "reference", "metadata"))
            ended = tokenizer.eos_token_id in ids
            text = tokenizer.decode([token for token in ids if job.task == "srl" or token != tokenizer.eos_token_id])
            about = json.loads(metadata) | {"finish_reason": "stop" if ended else "length"}
            found.append(find_verifier(name)(text, reference, about).reward)
        rewards.append(sum(found) / len(found))
        return found

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.ended(rewards[-1])

    arguments = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        max_steps=job.steps,
        num_generations=job.group,
        per_device_train_batch_size=job.group,
        gradient_accumulation_steps=job.prompts,
        max_completion_length=job.max_tokens,
        temperature=1.0,
        epsilon_high=CLIP_HIGH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
    )
    trainer = trl.GRPOTrainer(
        network,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    gate.ready()
    trainer.train()


def _rows_in_our_order(job: Job, folder: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The prompts of all updates as text, in the order in which our run draws them."""
    from srl_rlvr import config as configs
    from srl_rlvr.examples import sources
    from srl_rlvr.examples.curriculum import Order
    from srl_rlvr.stages import rlvr, srl

    config = configs.load(_run_file(job, folder))
    stage: Any = config.stages[0]
    examples, _, _ = sources.load_all(config.data, config.seed)
    if job.task == "srl":
        prompts = srl.prompts(examples, tokenizer, stage, config.think)
    else:
        prompts = rlvr.prompts(examples, tokenizer, stage.label, config.think)
    order = Order(prompts["trunk_id"].to_pylist(), config.seed, stage.label)
    drawn = [row for i in range(job.steps) for row in order.take(i * job.prompts, job.prompts)]
    keys = ("verifier", "reference", "metadata")
    return [
        {"prompt": tokenizer.decode(row["token_ids"])} | {key: row[key] for key in keys}
        for row in prompts.take(drawn).to_pylist()
    ]


if __name__ == "__main__":
    main()
