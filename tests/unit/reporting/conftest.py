"""A made-up run that looks like a real one: its tables for report.html, of any size, from one seed."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pyarrow as pa
import pytest

from srl_rlvr.reporting.report import ROLLOUT_VIEW
from srl_rlvr.reporting.result import interval

CONFIG = {
    "name": "chain-sum-small",
    "model_type": "task_llm",
    "model": {"base": "smollm2-135m-instruct"},
    "stages": [
        {"name": "", "kind": "sft"},
        {"name": "", "kind": "srl", "steps": 40},
        {"name": "", "kind": "rlvr", "steps": 60},
    ],
}

RESULT = {
    "model_type": "task_llm",
    "held_out": {
        "n": 200,
        "base": interval(12, 200)._asdict(),
        "sft": interval(41, 200)._asdict(),
        "srl": interval(68, 200)._asdict(),
        "rlvr": interval(103, 200)._asdict(),
    },
    "minutes": 27.4,
    "peak_memory_gib": 5.83,
    "sampled_tokens": 412_903,
}


def made_up_metrics(srl: int = 40, rlvr: int = 60, seed: int = 0) -> pa.Table:
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    seconds = 40.0
    for step in range(16):
        seconds += draw.uniform(3, 4)
        loss = 0.6 + 1.5 * math.exp(-step / 5) + draw.gauss(0, 0.05)
        rows.append({"stage": "sft", "step": step, "loss": loss, "grad_norm": 2 + draw.random(), "seconds": seconds})
    for stage, steps in (("srl", srl), ("rlvr", rlvr)):
        seconds += 90.0
        for step in range(steps):
            rows.append(_policy_gradient_row(draw, stage, step, step / max(steps - 1, 1)))
            seconds += sum(rows[-1][part] for part in ("sample_s", "verify_s", "update_s", "handover_s"))
            rows[-1]["seconds"] = seconds
    for update, row in enumerate(rows):
        row["update"] = update
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _policy_gradient_row(draw: random.Random, stage: str, step: int, part: float) -> dict[str, Any]:
    reward = (0.35 if stage == "srl" else 0.2) + 0.4 * (1 - math.exp(-3 * part)) + draw.gauss(0, 0.05)
    failed = int(draw.random() < 0.06)
    invalid = max(0, round(10 * (1 - part) + draw.gauss(0, 2)))
    return {
        "stage": stage,
        "step": step,
        "reward": reward,
        "reward_std": 0.3 - 0.1 * part,
        "pass_rate": min(1.0, max(0.0, reward - 0.1 + draw.gauss(0, 0.03))),
        "loss": draw.gauss(0, 0.02),
        "grad_norm": 0.5 + abs(draw.gauss(0, 0.2)),
        "kl": 0.02 * part + 0.002 * draw.random(),
        "entropy": 1.1 - 0.5 * part + draw.gauss(0, 0.04),
        "divergence": 2e-5 + abs(draw.gauss(0, 1e-5)),
        "completion_tokens": 38 - 10 * part + draw.gauss(0, 2),
        "groups_drawn": 8.0 + 8 * (draw.random() < 0.3),
        "groups_with_signal": float(draw.randint(5, 8)),
        "scored": 64.0 - failed - invalid,
        "invalid": float(invalid),
        "failed": float(failed),
        "tokens_per_s": 170 + draw.gauss(0, 8),
        "sample_s": 4 + draw.random(),
        "verify_s": 0.2 + 0.1 * draw.random(),
        "update_s": 5 + draw.random(),
        "handover_s": 1.9 + 0.2 * draw.random(),
        "learning_rate": 1e-5 * min(1, (step + 1) / 3),
        "a_metric_nobody_knows": 1.0,
    }


_PIECES = [
    "1",
    "2",
    "3",
    "4",
    "7",
    " +",
    " =",
    " -",
    "12",
    "48",
    "The",
    " sum",
    " of",
    " is",
    " so",
    ",",
    ".\n",
    " first",
    " we",
    " add",
]


def made_up_rollouts(steps: int = 40, groups: int = 4, samples: int = 8, tokens: int = 40, seed: int = 0) -> pa.Table:
    """`steps` of each of srl and rlvr."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for stage in ("srl", "rlvr"):
        for step in range(steps):
            for group in range(groups):
                rows += _group(draw, stage, step, group, samples, tokens)
    return pa.Table.from_pylist(rows, schema=ROLLOUT_VIEW)


def _group(draw: random.Random, stage: str, step: int, group: int, samples: int, tokens: int) -> list[dict[str, Any]]:
    numbers = [draw.randint(10, 99) for _ in range(4)]
    asked = " + ".join(map(str, numbers))
    rewards = [round(draw.random(), 3) if stage == "srl" else float(draw.random() < 0.4) for _ in range(samples)]
    mean = sum(rewards) / samples
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / samples) or 1.0
    rows = []
    for index, reward in enumerate(rewards):
        outcome = draw.choices(["scored", "invalid", "failed"], [90, 8, 2])[0]
        length = max(3, round(draw.gauss(tokens, tokens / 6)))
        rows.append(
            {
                "stage": stage,
                "step": step,
                "prompt_id": f"{draw.getrandbits(64):016x}/{group}",
                "sample_index": index,
                "prompt": f"<|im_start|>user\nState the final answer to: {asked} =<|im_end|>\n<|im_start|>assistant\n"
                + (f"{numbers[0]} + {numbers[1]} = {numbers[0] + numbers[1]}\n" if stage == "srl" else ""),
                "reference": f"{numbers[0] + numbers[1]} + {numbers[2]} = {sum(numbers[:3])}"
                if stage == "srl"
                else str(sum(numbers)),
                "tokens": [*draw.choices(_PIECES, k=length - 1), "<|im_end|>"],
                "logprobs": [-(abs(draw.gauss(0, 1.2)) ** 2) for _ in range(length)],
                "advantage": None if outcome == "failed" else (reward - mean) / std,
                "reward": reward,
                "outcome": outcome,
                "components": json.dumps({"similarity": reward, "format": outcome == "scored"}),
                "detail": {"scored": "", "invalid": "no line break at the end", "failed": "verifier timed out"}[
                    outcome
                ],
                "finish_reason": draw.choices(["stop", "length"], [9, 1])[0],
            }
        )
    for row in rows:
        row["prompt_id"] = rows[0]["prompt_id"]
    return rows


@pytest.fixture
def metrics() -> pa.Table:
    return made_up_metrics(srl=4, rlvr=3)


@pytest.fixture
def rollouts() -> pa.Table:
    return made_up_rollouts(steps=2, groups=2, samples=3, tokens=8)


@pytest.fixture
def long_run() -> tuple[pa.Table, pa.Table]:
    """Metrics and rollouts of 100 steps with 4 groups of 8 samples of 60 tokens kept."""
    return made_up_metrics(), made_up_rollouts(steps=50, groups=4, samples=8, tokens=60)


@pytest.fixture
def config() -> dict[str, Any]:
    return CONFIG


@pytest.fixture
def result() -> dict[str, Any]:
    return RESULT
