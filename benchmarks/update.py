"""One SRL update: as prefix trees, and the same samples one by one in padded batches.

    python benchmarks/update.py            five updates of either side in turn, 6 steps × 8 samples each
    python benchmarks/update.py --quick    one of each, 2 steps × 4 samples

Prompt 200 tokens, step 50, completion 60, of SmolLM2-135M-Instruct in fp32. Both sides learn from the same samples with
the same loss and optimizer. Every update runs in a process of its own, so that its peak of resident memory is its own.
The tree recomputes activations in its backward pass (activation checkpointing): slower, lighter. The rival keeps them.
Prints a table and one JSON line; `tree_vs_one_by_one` is the ratio of the medians' rates.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _machine import commit, machine

MODEL = "smollm2-135m-instruct"
PROMPT, STEP, COMPLETION = 200, 50, 60
# Tokens of one forward and backward pass. One by one, more than a few rows at once gain nothing on a CPU.
BUDGET = {"tree": 4096, "one_by_one": 2048, "trl": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--side", choices=list(BUDGET), help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps, group = (2, 4) if options.quick else (6, 8)
    if options.side:
        print(json.dumps(measure(options.side, steps, group)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in BUDGET}
    for _ in range(1 if options.quick else 5):
        for side, runs in found.items():
            runs.append(_in_a_process_of_its_own(side, options.quick))
    print(f"{'side':<12} {'s/update':>9} {'tokens computed':>16} {'peak GiB':>9}")
    medians = {side: _medians(runs) for side, runs in found.items()}
    for side, of in medians.items():
        print(f"{side:<12} {of['seconds']:>9.1f} {of['tokens']:>16.0f} {of['peak_gib']:>9.2f}")
    tree, rival = medians["tree"], medians["one_by_one"]
    figures = {
        "tree_vs_one_by_one": round(rival["seconds"] / tree["seconds"], 2),
        "peak_memory_ratio": round(tree["peak_gib"] / rival["peak_gib"], 2),
        "loss_difference": abs(tree["loss"] - rival["loss"]),
    }
    print(json.dumps({"benchmark": "update", "figures": figures, "machine": machine(), "commit": commit()}))


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def measure(side: str, steps: int, group: int) -> dict[str, float]:
    """Seconds, computed tokens, loss and peak memory of one update after a small one that warms everything up."""
    import torch

    from srl_rlvr.cli.session import model_cache
    from srl_rlvr.policies import base_models

    folder = base_models.resolve(MODEL, model_cache())
    torch.manual_seed(0)
    update = {"tree": _tree, "one_by_one": _one_by_one, "trl": _trl}[side](folder)
    update(_samples(1, 2))
    samples = _samples(steps, group)
    began = time.perf_counter()
    loss, tokens = update(samples)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "tokens": float(tokens), "loss": loss, "peak_gib": peak}


def _samples(steps: int, group: int) -> list[dict[str, Any]]:
    """Random tokens in the shape of one problem's step prompts and their groups."""
    import numpy as np

    rng = np.random.default_rng(0)
    trunk = rng.integers(10, 40_000, PROMPT + STEP * (steps - 1)).tolist()
    return [
        {
            "prompt_id": f"p:{k}",
            "sample_index": i,
            "trunk_id": "p",
            "policy_version": 0,
            "prompt_ids": trunk[: PROMPT + STEP * k],
            "completion_ids": rng.integers(10, 40_000, COMPLETION).tolist(),
            "behavior_logprobs": [-10.0] * COMPLETION,
            "advantage": float(rng.normal()),
        }
        for k in range(steps)
        for i in range(group)
    ]


def _tree(folder: Path) -> Any:
    from srl_rlvr import records
    from srl_rlvr.policies.losses import UpdateSpec
    from srl_rlvr.policies.prefix_tree import build_trees, plant
    from srl_rlvr.policies.text import TextPolicy

    policy = TextPolicy(folder, tokens_per_microbatch=BUDGET["tree"], activation_checkpointing=True)

    def update(samples: list[dict[str, Any]]) -> tuple[float, int]:
        table = records.build("Sample", samples)
        forests = plant(build_trees(table), BUDGET["tree"])
        tokens = sum(len(pack.token_ids) for forest in forests for pack in forest.packs)
        return policy.update(table, UpdateSpec("policy_gradient", learning_rate=1e-9))["loss"], tokens

    return update


def _one_by_one(folder: Path) -> Any:
    import torch

    from srl_rlvr.policies import base_models
    from srl_rlvr.policies.losses import UpdateSpec, policy_gradient_loss

    network = base_models.load_model(folder)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-9, betas=(0.9, 0.99), weight_decay=0.0)
    spec = UpdateSpec("policy_gradient", learning_rate=1e-9)

    def update(samples: list[dict[str, Any]]) -> tuple[float, int]:
        optimizer.zero_grad(set_to_none=True)
        total, tokens, completion_tokens = 0.0, 0, COMPLETION * len(samples)
        rows = sorted(samples, key=lambda sample: len(sample["prompt_ids"]))
        while rows:
            longest = len(rows[-1]["prompt_ids"]) + COMPLETION
            batch = [rows.pop() for _ in range(min(len(rows), max(1, BUDGET["one_by_one"] // longest)))]
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
            behavior = torch.full_like(logprobs, -10.0)
            loss = policy_gradient_loss(logprobs, logprobs.detach(), behavior, advantages, None, spec).loss
            (loss / completion_tokens).backward()
            total += float(loss.detach())
            tokens += ids.numel()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return total / completion_tokens, tokens

    return update


def _trl(folder: Path) -> Any:
    """TRL's trainer with its own loss, its own microbatches of eight rows and activation checkpointing, its defaults.

    A microbatch is one group, padded to its own length only (a whole batch padded at once would be 24,480 tokens).
    """
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    from srl_rlvr.policies import base_models

    trl = _import_trl()
    network = base_models.load_model(folder)
    network.config._name_or_path = str(folder)
    arguments = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        learning_rate=1e-9,
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

    def update(samples: list[dict[str, Any]]) -> tuple[float, int]:
        batches = [samples[i : i + rows] for i in range(0, len(samples), rows)]
        trainer.current_gradient_accumulation_steps = arguments.steps_per_generation = len(batches)
        optimizer.zero_grad()
        total, tokens = 0.0, 0
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
            total += float(loss.detach())
            tokens += prompts.numel() + completions.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        return total, tokens

    return update


def _import_trl() -> Any:
    try:
        import trl
    except ImportError:
        raise SystemExit("benchmarks/update.py compares with TRL: pip install 'srl-rlvr[bench]'") from None
    return trl


def _in_a_process_of_its_own(side: str, quick: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, *(["--quick"] if quick else [])]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
