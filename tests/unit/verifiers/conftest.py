from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from srl_rlvr import records
from srl_rlvr.verifiers.pool import VerifierPool

_BAD = (
    *("hang", "hang_without_yielding", "leave", "die_by_signal", "misbehave", "echo", "refuse", "count_starts"),
    *("start_a_child", "no_such_function", "as_verl", "as_trl"),
)
OWN = [f"bad_verifiers:{name}" for name in _BAD] + ["slow_to_import:quick", "ends_on_import:f", "no_such_package:f"]
Batch = Callable[..., tuple[pa.Table, pa.Table]]


@pytest.fixture
def bad_verifiers_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
        with VerifierPool(workers=2, deadline_s=0.5, own=OWN) as pool:
            yield pool


@pytest.fixture
def own_verifiers() -> list[str]:
    return OWN


@pytest.fixture
def batch() -> Batch:
    return make_batch


def make_batch(
    verifier: str,
    texts: Sequence[str],
    reference: str = "",
    metadata: Mapping[str, Any] | None = None,
    finish_reason: str = "stop",
) -> tuple[pa.Table, pa.Table]:
    """One prompt, and a rollout for each text."""
    prompt = {
        "id": "p",
        "example_id": "e",
        "stage": "rlvr",
        "step_index": -1,
        "token_ids": [1],
        "trunk_id": "e",
        "offset": 0,
        "verifier": verifier,
        "reference": reference,
        "metadata": json.dumps(metadata or {}),
    }
    rollouts = [
        {
            "prompt_id": "p",
            "sample_index": index,
            "policy_version": 0,
            "token_ids": [1],
            "logprobs": [0.0],
            "text": text,
            "finish_reason": finish_reason,
        }
        for index, text in enumerate(texts)
    ]
    return records.build("Prompt", [prompt]), records.build("Rollout", rollouts)
