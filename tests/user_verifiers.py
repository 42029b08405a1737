"""Verifiers of a user's own, as data files name them in their `verifier` column: one that rewards a random model
densely, and some that misbehave on part of the answers."""

from __future__ import annotations

import os
import time
import zlib
from typing import Any

from srl_rlvr.verifiers import Score


def dense(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """The share of letters: varies from sample to sample, whatever the model."""
    share = sum(character.isalpha() for character in text) / max(1, len(text))
    return Score("scored", share, {"letters": share}, f"{len(text)} characters against '{reference}'")


def hangs(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    if _one_in_four(text, reference):
        time.sleep(3600)
    return dense(text, reference, metadata)


def crashes(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    if _one_in_four(text, reference):
        os._exit(3)
    return dense(text, reference, metadata)


def returns_nan(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    if _one_in_four(text, reference):
        return Score("scored", float("nan"))
    return dense(text, reference, metadata)


def _one_in_four(text: str, reference: str) -> bool:
    return zlib.crc32(f"{text}/{reference}".encode()) % 4 == 0
