"""Supervised reinforcement learning (Deng et al., 2510.25992): each expert step is asked for on its own.

A solution of N steps gives N prompts (or one for every `lines_per_action` of them), prefixes of one trunk; the reward
is the similarity of the policy's action to the expert's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from srl_rlvr import model_types, records
from srl_rlvr.config import SrlStage
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import InputError
from srl_rlvr.model_types import Solution
from srl_rlvr.stages import THINK_STOP


def prompts(
    examples: pa.Table, tokenizer: Any, stage: SrlStage, think: bool, thoughts: Mapping[str, list[int]] | None = None
) -> pa.Table:
    """Every step prompt of every example, the steps of one problem together and in order.

    Before a step whose prompt has one of `thoughts`, its tokens by prompt id, that stands in the prompts after it.
    """
    rows, model_type = [], model_types.of(examples)
    for example in with_steps(examples):
        solution = model_type.encode_solution(tokenizer, example, think)
        thought = [(thoughts or {}).get(step_id(example["id"], k), []) + step for k, step in enumerate(solution.steps)]
        given = replace(solution, steps=thought)
        for k, reference, _ in _actions(solution, stage.lines_per_action):
            trunk = given.trunk(k)
            metadata = model_type.step_metadata(solution, k, think, stage.measure)
            rows.append(
                {
                    "id": step_id(example["id"], k),
                    "example_id": example["id"],
                    "stage": stage.label,
                    "step_index": k,
                    "token_ids": trunk,
                    "images": example["images"],
                    "trunk_id": example["id"],
                    "offset": len(trunk),
                    "verifier": model_type.step_verifier,
                    "reference": reference,
                    "metadata": json.dumps(metadata),
                }
            )
    return records.build("Prompt", rows)


def expert_actions(examples: pa.Table, tokenizer: Any, stage: SrlStage) -> dict[str, list[int]]:
    """The tokens of the expert's action by prompt id."""
    model_type = model_types.of(examples)
    solutions = {row["id"]: model_type.encode_solution(tokenizer, row, think=False) for row in with_steps(examples)}
    return {
        step_id(id, k): tokens
        for id, solution in solutions.items()
        for k, _, tokens in _actions(solution, stage.lines_per_action)
    }


def best_thoughts(
    rollouts: pa.Table, verdicts: pa.Table, tokenizer: Any, least: float = -math.inf
) -> dict[str, list[int]]:
    """By prompt id the tokens of the thought, tags and all, before the action that earned most, of equals the first;
    none where the form of every sample is broken, or all earned less than `least`."""
    best: dict[str, tuple[float, list[int]]] = {}
    for rollout, verdict in zip(rollouts.to_pylist(), verdicts.to_pylist(), strict=True):
        id, reward = rollout["prompt_id"], verdict["reward"]
        if verdict["outcome"] == records.SCORED and reward >= least and (id not in best or reward > best[id][0]):
            best[id] = reward, _thought(rollout["token_ids"], tokenizer)
    return {id: thought for id, (_, thought) in best.items()}


def _thought(tokens: list[int], tokenizer: Any) -> list[int]:
    """The tokens up to the one that closes the thought. What it holds beyond that is the action's and lost to it."""
    ends = (end for end in range(1, len(tokens) + 1) if THINK_STOP in tokenizer.decode(tokens[:end]))
    return tokens[: next(ends, 0)]


def step_id(example_id: str, k: int) -> str:
    """Of the prompt for this step."""
    return f"{example_id}:{k}"


def _actions(solution: Solution, lines: int) -> list[tuple[int, str, list[int]]]:
    """Of each action of so many steps (0: all): its first step, its reference and its tokens."""
    size, count = lines or len(solution.steps), len(solution.steps)
    return [
        (
            k,
            "".join(solution.references[k : k + size]),
            [token for step in solution.steps[k : k + size] for token in step],
        )
        for k in range(0, count, size)
    ]


def with_steps(examples: pa.Table) -> list[dict[str, Any]]:
    """The rows of `examples`. Raises InputError naming the first that has no expert steps."""
    rows = examples.to_pylist()
    for row in rows:
        if not row["steps"]:
            raise InputError(
                f"problem {row['id']} of '{row['task']}' has no expert steps ({row['provenance']}), which SFT, DPO "
                "and SRL need: give its row 'steps' or 'solution', let their 'examples' count only the problems before "
                "it, or train with rlvr stages only"
            )
    return rows


def sampling(stage: SrlStage, think: bool, seed: int) -> SamplingSpec:
    """An action ends with its last line break (or the end of the text); under `think` a monologue comes before each of
    its lines, in which line breaks do not count."""
    ends = ("\n",) * stage.lines_per_action
    return SamplingSpec(
        samples=stage.group_size,
        temperature=stage.temperature,
        max_tokens=stage.max_tokens,
        stops=tuple(stop for end in ends for stop in ((THINK_STOP, end) if think else (end,))),
        seed=seed,
    )
