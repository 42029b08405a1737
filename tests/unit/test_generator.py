"""The Generator actor, without Ray."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors import generator
from srl_rlvr import engines
from srl_rlvr.engines import Completion, SamplingSpec
from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models
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
    monkeypatch.setattr(generator.base_models, "on_this_node", Path)
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


def test_a_model_is_found_on_the_node_that_loads_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name leads to another folder on each node; a folder that only another node has is an error that says so."""
    made: list[Path] = []
    monkeypatch.setattr(engines, "create", lambda kind, model, config: made.append(model))
    plain: Any = generator.Generator.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    for node in ("one", "two"):
        monkeypatch.setenv("SRL_RLVR_CACHE", str(tmp_path / node))
        shutil.copytree(tiny_model, tmp_path / node / "models" / "smollm2-135m-instruct")
        plain("transformers", base_models.for_all_nodes("smollm2-135m-instruct"), {}, "task_llm", 16)
    assert made == [tmp_path / node / "models" / "smollm2-135m-instruct" for node in ("one", "two")]
    plain("transformers", base_models.for_all_nodes(str(tiny_model)), {}, "task_llm", 16)
    assert made[-1] == tiny_model.resolve()
    with pytest.raises(InputError, match=f"node .* has no folder {tmp_path}/of-another"):
        plain("transformers", f"{tmp_path}/of-another", {}, "task_llm", 16)


def test_the_name_travels_to_the_learner_and_no_path_of_the_driver() -> None:
    from actors.supervisor import _learner_spec
    from srl_rlvr import config

    run = config.parse({"name": "a", "data": [{"path": "a"}], "stages": [{"kind": "sft"}]}, "run")
    assert _learner_spec(run, base_models.for_all_nodes("someone/model"), Path("out")).model == "someone/model"
