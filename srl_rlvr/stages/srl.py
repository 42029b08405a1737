"""Supervised reinforcement learning (Deng et al., 2510.25992): each expert step is asked for on its own.

A solution of N steps gives N prompts, prefixes of one trunk; the reward is the similarity of the policy's action
to the expert's step.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from srl_rlvr import records
from srl_rlvr.config import SrlStage
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import InputError
from srl_rlvr.model_types import task_llm
from srl_rlvr.stages import THINK_STOP


def prompts(examples: pa.Table, tokenizer: Any, stage: SrlStage, think: bool) -> pa.Table:
    """Every step prompt of every example, the steps of one problem together and in order."""
    rows = []
    metadata = json.dumps({"think": think, "measure": stage.measure})
    for example in with_steps(examples):
        solution = task_llm.encode_solution(tokenizer, example, think)
        for k, text in enumerate(solution.texts):
            trunk = solution.trunk(k)
            rows.append(
                {
                    "id": f"{example['id']}:{k}",
                    "example_id": example["id"],
                    "stage": stage.label,
                    "step_index": k,
                    "token_ids": trunk,
                    "trunk_id": example["id"],
                    "offset": len(trunk),
                    "verifier": "similarity",
                    "reference": text,
                    "metadata": metadata,
                }
            )
    return records.build("Prompt", rows)


def expert_actions(examples: pa.Table, tokenizer: Any) -> dict[str, list[int]]:
    """The tokens of the expert's step by prompt id."""
    solutions = {row["id"]: task_llm.encode_solution(tokenizer, row, think=False) for row in with_steps(examples)}
    return {f"{id}:{k}": tokens for id, solution in solutions.items() for k, tokens in enumerate(solution.steps)}


def with_steps(examples: pa.Table) -> list[dict[str, Any]]:
    """The rows of `examples`. Raises InputError naming the first that has no expert steps."""
    rows = examples.to_pylist()
    for row in rows:
        if not row["steps"]:
            raise InputError(
                f"problem {row['id']} of '{row['task']}' has no expert steps ({row['provenance']}); SFT and SRL need "
                "them: give its row 'steps' or 'solution', or train it with an rlvr stage only"
            )
    return rows


def sampling(stage: SrlStage, think: bool, seed: int) -> SamplingSpec:
    """An action ends with its line break (or the end of the text); under `think` the monologue comes first."""
    return SamplingSpec(
        samples=stage.group_size,
        temperature=stage.temperature,
        max_tokens=stage.max_tokens,
        stops=(THINK_STOP, "\n") if think else ("\n",),
        seed=seed,
    )
