"""A verifier whose module and whose warm-up each take longer than the deadline of the tests."""

import time
from typing import Any

from srl_rlvr.verifiers.base import SCORED, Score

time.sleep(0.6)
_warm: list[bool] = []


def warm_up(metadata: dict[str, Any]) -> None:
    if not _warm:
        time.sleep(0.6)
        _warm.append(True)


def quick(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    return Score(SCORED, 1.0)
