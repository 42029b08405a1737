"""One SRL update: as prefix trees, the same samples one by one, and by TRL's GRPOTrainer.

    python benchmarks/update.py            five updates of each side in turn, 6 steps × 8 samples each
    python benchmarks/update.py --quick    one of each, 2 steps × 4 samples, with a model of 4 million parameters
    python benchmarks/update.py --rivals one_by_one    without TRL, which takes most of the time

Prompt 200 tokens, step 50, completion 60, of SmolLM2-135M-Instruct in fp32. All sides learn from the same samples with
the same loss: importance weights are 1, and TRL's default loss is then ours. Every update runs in a process of its own,
so that its peak of resident memory is its own, with the allocator and threads of the product's learner.

- tree: the learner's defaults.
- one_by_one: rows of at most 512 tokens at once, that is one sample. On a CPU more rows gain nothing and cost memory.
- trl: a `GRPOTrainer` with its defaults (microbatches of 8 rows, activation checkpointing), in fp32. It scores every
  position with the output head. Microbatches are padded to their own length only, which TRL's own batches are not.

Prints a table and one JSON line; the figures are ratios of medians: of update rates, and of peaks of memory. The
gradients of the first round are compared parameter tensor by parameter tensor: |tree - rival| / |rival|, the largest of
all. Learning rates are 0: a first update that differs in its last bits would set the second one apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _machine import actors_environment, import_trl, model, tell

PROMPT, STEP, COMPLETION = 200, 50, 60
# So low that every importance weight is at its cap, which is 1 here: TRL has none without vLLM.
BEHAVIOR, IMPORTANCE_CAP = -100.0, 1.0
RIVALS = ("one_by_one", "trl")
ROW_BUDGET = 512  # tokens of one padded batch of the side one_by_one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS)
    parser.add_argument("--side", choices=("tree", *RIVALS), help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.quick, options.gradients)))
        return
    sides = ("tree", *options.rivals)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        gradients = {side: Path(folder) / f"{side}.pt" for side in sides}
        for turn in range(1 if options.quick else 5):
            for side, runs in found.items():
                runs.append(_in_a_process_of_its_own(side, options.quick, None if turn else gradients[side]))
                print(f"{side}: {runs[-1]['seconds']:.1f} s, {runs[-1]['peak_gib']:.2f} GiB", file=sys.stderr)
        differences = {side: _gradient_difference(gradients["tree"], gradients[side]) for side in options.rivals}
    print(f"{'side':<12} {'s/update':>9} {'tokens computed':>16} {'peak GiB':>9}")
    medians = {side: _medians(runs) for side, runs in found.items()}
    for side, of in medians.items():
        print(f"{side:<12} {of['seconds']:>9.1f} {of['tokens']:>16.0f} {of['peak_gib']:>9.2f}")
    tree, figures = medians["tree"], {}
    for rival in options.rivals:
        figures[f"tree_vs_{rival}"] = round(medians[rival]["seconds"] / tree["seconds"], 2)
        figures[f"peak_vs_{rival}"] = round(tree["peak_gib"] / medians[rival]["peak_gib"], 2)
        figures[f"gradient_vs_{rival}"] = float(f"{differences[rival]:.1e}")
    tell("update", figures, whole=not options.quick and set(options.rivals) == set(RIVALS))


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _gradient_difference(ours: Path, theirs: Path) -> float:
    """The largest relative difference of a parameter tensor's gradient."""
    import torch

    found, expected = (torch.load(path, mmap=True) for path in (ours, theirs))
    assert found.keys() == expected.keys()
    norms = {name: (found[name] - rival).norm() / rival.norm() for name, rival in expected.items()}
    return float(max(norms.values()))


def measure(side: str, quick: bool, gradients: Path | None) -> dict[str, float]:
    """Seconds, computed tokens and peak memory of one update after a small one that warms everything up.

    Its gradient is written to the file `gradients` afterwards.
    """
    import torch

    folder = model(quick)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    network, update = {"tree": _tree, "one_by_one": _one_by_one, "trl": _trl}[side](folder)
    update(_samples(1, 2, vocabulary))
    samples = _samples(*((2, 4) if quick else (6, 8)), vocabulary)
    began = time.perf_counter()
    tokens = update(samples)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if gradients is not None:
        torch.save({name: parameter.grad for name, parameter in network.named_parameters()}, gradients)
    return {"seconds": seconds, "tokens": float(tokens), "peak_gib": peak}


def _samples(steps: int, group: int, vocabulary: int) -> list[dict[str, Any]]:
    """Random tokens in the shape of one problem's step prompts and their groups."""
    import numpy as np

    rng = np.random.default_rng(0)
    highest = min(40_000, vocabulary)
    trunk = rng.integers(10, highest, PROMPT + STEP * (steps - 1)).tolist()
    return [
        {
            "prompt_id": f"p:{k}",
            "sample_index": i,
            "trunk_id": "p",
            "policy_version": 0,
            "prompt_ids": trunk[: PROMPT + STEP * k],
            "completion_ids": rng.integers(10, highest, COMPLETION).tolist(),
            "behavior_logprobs": [BEHAVIOR] * COMPLETION,
            "advantage": float(rng.normal()),
        }
        for k in range(steps)
        for i in range(group)
    ]


def _tree(folder: Path) -> Any:
    from srl_rlvr import records
    from srl_rlvr.config import LearnerConfig
    from srl_rlvr.policies.losses import UpdateSpec
    from srl_rlvr.policies.prefix_tree import build_trees, plant
    from srl_rlvr.policies.text import TextPolicy

    learner = LearnerConfig()
    policy = TextPolicy(
        folder,
        tokens_per_microbatch=learner.tokens_per_microbatch,
        activation_checkpointing=learner.activation_checkpointing,
    )

    spec = UpdateSpec("policy_gradient", learning_rate=0.0, importance_cap=IMPORTANCE_CAP)

    def update(samples: list[dict[str, Any]]) -> int:
        table = records.build("Sample", samples)
        forests = plant(build_trees(table), learner.tokens_per_microbatch)
        tokens = sum(len(pack.token_ids) for forest in forests for pack in forest.packs)
        policy.update(table, spec)
        return tokens

    return policy.network, update


def _one_by_one(folder: Path) -> Any:
    import torch

    from srl_rlvr.policies import base_models
    from srl_rlvr.policies.losses import UpdateSpec, policy_gradient_loss

    network = base_models.load_model(folder)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    spec = UpdateSpec("policy_gradient", learning_rate=0.0, importance_cap=IMPORTANCE_CAP)

    def update(samples: list[dict[str, Any]]) -> int:
        optimizer.zero_grad(set_to_none=True)
        tokens, completion_tokens = 0, COMPLETION * len(samples)
        rows = sorted(samples, key=lambda sample: len(sample["prompt_ids"]))
        while rows:
            longest = len(rows[-1]["prompt_ids"]) + COMPLETION
            batch = [rows.pop() for _ in range(min(len(rows), max(1, ROW_BUDGET // longest)))]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, sample in enumerate(batch):  # padded on the left: completions end together
                sequence = sample["prompt_ids"] + sample["completion_ids"]
                ids[row, longest - len(sequence) :] = torch.tensor(sequence)
                mask[row, longest - len(sequence) :] = 1
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = network(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=COMPLETION + 1,
            ).logits[:, :-1]
            targets = ids[:, -COMPLETION:]
            logprobs = (logits.gather(2, targets[..., None])[..., 0] - logits.logsumexp(dim=2)).flatten()
            advantages = torch.tensor([sample["advantage"] for sample in batch]).repeat_interleave(COMPLETION)
            behavior = torch.full_like(logprobs, BEHAVIOR)
            loss = policy_gradient_loss(logprobs, logprobs.detach(), behavior, advantages, None, spec).loss
            (loss / completion_tokens).backward()
            tokens += ids.numel()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return tokens

    return network, update


def _trl(folder: Path) -> Any:
    """TRL's trainer with its own loss, its own microbatches of eight rows and activation checkpointing, its defaults.

    A microbatch is one group, padded to its own length only (a whole batch padded at once would be 24,480 tokens).
    """
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    from srl_rlvr.policies import base_models

    trl = import_trl()
    network = base_models.load_model(folder)
    network.config._name_or_path = str(folder)
    arguments = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        learning_rate=0.0,
        max_completion_length=COMPLETION,
    )
    trainer = trl.GRPOTrainer(
        network,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "-"}]),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    model = trainer.model.train()
    model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)  # as its train() does
    optimizer = trainer.create_optimizer()
    rows = arguments.per_device_train_batch_size

    def update(samples: list[dict[str, Any]]) -> int:
        batches = [samples[i : i + rows] for i in range(0, len(samples), rows)]
        trainer.current_gradient_accumulation_steps = arguments.steps_per_generation = len(batches)
        optimizer.zero_grad()
        tokens = 0
        for batch in batches:
            longest = max(len(sample["prompt_ids"]) for sample in batch)
            padding = [longest - len(sample["prompt_ids"]) for sample in batch]
            prompts = torch.tensor([[0] * p + sample["prompt_ids"] for p, sample in zip(padding, batch, strict=True)])
            completions = torch.tensor([sample["completion_ids"] for sample in batch])
            inputs = {
                "prompt_ids": prompts,
                "prompt_mask": (torch.arange(longest) >= torch.tensor(padding)[:, None]).long(),
                "completion_ids": completions,
                "completion_mask": torch.ones_like(completions),
                "advantages": torch.tensor([sample["advantage"] for sample in batch]),
                "num_items_in_batch": torch.tensor(len(samples) * COMPLETION),
            }
            loss = trainer.compute_loss(model, inputs)
            trainer.accelerator.backward(loss)
            tokens += prompts.numel() + completions.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        return tokens

    return model, update


def _in_a_process_of_its_own(side: str, quick: bool, gradients: Path | None) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, *(["--quick"] if quick else [])]
    command += ["--gradients", str(gradients)] if gradients else []
    environment = os.environ | actors_environment(quick)["env_vars"]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(found.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
