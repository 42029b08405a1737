from __future__ import annotations

from pathlib import Path

import pytest

from srl_rlvr.model_types import task_llm
from srl_rlvr.policies import base_models

EXAMPLE = {"prompt": "3 + 4 + 5", "steps": ["3 + 4 = 7", "7 + 5 = 12"], "reference": "12"}


def test_a_trunk_is_the_concatenation_of_its_parts(tiny_model: Path) -> None:
    solution = task_llm.TYPE.encode_solution(base_models.load_tokenizer(tiny_model), EXAMPLE, think=False)
    assert len(solution.steps) == len(solution.references) == 3
    for k in range(3):
        assert solution.trunk(k) == solution.prompt + [token for step in solution.steps[:k] for token in step]


def test_every_step_ends_where_the_policy_has_to_end_it(tiny_model: Path) -> None:
    tokenizer = base_models.load_tokenizer(tiny_model)
    solution = task_llm.TYPE.encode_solution(tokenizer, EXAMPLE, think=False)
    assert [tokenizer.decode(step)[-1] for step in solution.steps[:-1]] == ["\n", "\n"]
    assert solution.steps[-1][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("think", [False, True])
def test_the_prompt_is_that_of_the_solution(tiny_model: Path, think: bool) -> None:
    tokenizer = base_models.load_tokenizer(tiny_model)
    prompt = task_llm.TYPE.encode_prompt(tokenizer, EXAMPLE, think)
    assert task_llm.TYPE.encode_solution(tokenizer, EXAMPLE, think).prompt == prompt
