"""The Generator actor, without Ray."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors import generator
from srl_rlvr import engines
from srl_rlvr.engines import Completion, SamplingSpec
from srl_rlvr.policies.weights import Manifest
from srl_rlvr.records import build


class NotesItsThread:
    version = 0

    def __init__(self, *_: Any) -> None:
        self.threads = {threading.get_ident()}

    def sample(self, prompts: list[list[int]], spec: SamplingSpec, images: Any = ()) -> list[list[Completion]]:
        self.threads.add(threading.get_ident())
        return [[Completion([1], [0.0], "length")] for _ in prompts]

    def load(self, buffer: Any, manifest: Manifest) -> str:
        self.threads.add(threading.get_ident())
        return manifest.checksum


def test_the_engine_computes_in_one_thread_whichever_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that compute have two OpenMP teams, and libgomp then sleeps at barriers: sampling lost a tenth."""

    class Type:
        def load_tokenizer(self, *_: Any) -> Any:
            return self

        def decode(self, *_: Any, **__: Any) -> str:
            return "a"

    monkeypatch.setattr(engines, "create", NotesItsThread)
    monkeypatch.setattr(generator.model_types, "find", lambda _: Type())
    plain: Any = generator.Generator.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    actor = plain("vllm", str(Path()), {}, "task_llm", 16)
    prompt = {"id": "p", "example_id": "p", "stage": "rlvr", "step_index": -1, "token_ids": [1], "trunk_id": "p"}
    judged = {"offset": 1, "verifier": "exact", "reference": "", "metadata": "{}"}
    found: list[pa.Table] = []

    def as_ray_calls() -> None:
        found.append(actor.generate(build("Prompt", [prompt | judged]), SamplingSpec(1, 1.0, 1)))
        actor.load(None, Manifest(1, (), "sum"))

    other = threading.Thread(target=as_ray_calls)
    other.start()
    other.join()
    assert found[0].num_rows == 1
    assert len(actor.engine.threads) == 1
