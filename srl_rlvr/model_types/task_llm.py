"""The task LLM: a problem in, worked steps and an answer out.

The problem is the user's turn; the steps are lines of the assistant's answer, the last of them `Answer: …`.
Each line is tokenized on its own, so every step prompt is a true prefix of one token sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAME = "task_llm"
METRIC = "accuracy"
INSTRUCTION = "Solve the problem step by step, one step a line. The last line is 'Answer: ' and the result."
_THINKING = " Before each step think between <think> and </think>."


@dataclass(frozen=True)
class Solution:
    """An expert's work in tokens. `steps[k]` ends with the line break, the last with the end-of-text token."""

    prompt: list[int]
    steps: list[list[int]]
    texts: list[str]  # of the steps, as the similarity compares them: line breaks kept, end-of-text not

    def trunk(self, k: int) -> list[int]:
        """The tokens that step k is asked after: the problem and the steps before it."""
        return self.prompt + [token for step in self.steps[:k] for token in step]


def encode_prompt(tokenizer: Any, prompt: str, think: bool) -> list[int]:
    """Token ids of the conversation up to the beginning of the assistant's answer."""
    messages = [
        {"role": "system", "content": INSTRUCTION + (_THINKING if think else "")},
        {"role": "user", "content": prompt},
    ]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def encode_solution(tokenizer: Any, example: Mapping[str, Any], think: bool) -> Solution:
    """The example's expert steps and its answer line, tokenized."""
    texts = [f"{step}\n" for step in example["steps"]] + [f"Answer: {example['reference']}"]
    steps = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    steps[-1] = [*steps[-1], tokenizer.eos_token_id]
    return Solution(encode_prompt(tokenizer, example["prompt"], think), steps, texts)
