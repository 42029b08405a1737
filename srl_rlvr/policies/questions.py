"""The prompt of a ranking: a question and its candidates in tokens, packed into one list. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """What is ranked. Under `cross` the question's own tokens are empty, and each candidate's tokens hold both."""

    question: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    picked: tuple[int, ...] = ()  # candidates that come before the next pick


def pack(question: Question) -> list[int]:
    """The tokens of a prompt: how many candidates, the length of each text, the texts, the picks."""
    texts = (question.question, *question.candidates)
    lengths = [len(text) for text in texts]
    return [len(question.candidates), *lengths, *(token for text in texts for token in text), *question.picked]


def unpack(tokens: Sequence[int]) -> Question:
    """What `pack` packed. Raises ValueError where the tokens are shorter than they say."""
    count = tokens[0]
    lengths, at = tokens[1 : count + 2], count + 2
    if len(tokens) < at + sum(lengths):
        raise ValueError(f"a ranking prompt of {len(tokens)} tokens should have {at + sum(lengths)} or more")
    texts = []
    for length in lengths:
        texts.append(tuple(tokens[at : at + length]))
        at += length
    return Question(texts[0], tuple(texts[1:]), tuple(tokens[at:]))
