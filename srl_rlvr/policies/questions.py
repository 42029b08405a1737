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
    ranks: tuple[int, ...] = ()  # the places, from 1 on, at which a search had the candidates, where these count


def pack(question: Question) -> list[int]:
    """The tokens of a prompt: how many candidates, the length of the ranks and of each text, these, the picks."""
    parts = (question.ranks, question.question, *question.candidates)
    lengths = [len(part) for part in parts]
    return [len(question.candidates), *lengths, *(number for part in parts for number in part), *question.picked]


def unpack(tokens: Sequence[int]) -> Question:
    """What `pack` packed. Raises ValueError where the tokens are shorter than they say."""
    count = tokens[0]
    lengths, at = tokens[1 : count + 3], count + 3
    if len(tokens) < at + sum(lengths):
        raise ValueError(f"a ranking prompt of {len(tokens)} tokens should have {at + sum(lengths)} or more")
    parts = []
    for length in lengths:
        parts.append(tuple(tokens[at : at + length]))
        at += length
    ranks, question, *candidates = parts
    return Question(question, tuple(candidates), tuple(tokens[at:]), ranks)
