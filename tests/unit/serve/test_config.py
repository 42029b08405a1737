from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import served_models

from serve import config
from srl_rlvr.errors import InputError


def load(tmp_path: Path, text: str) -> config.ServeConfig:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    return config.load(file)


def test_paths_are_from_the_files_folder_where_they_are_there(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    found = load(tmp_path, '[[models]]\npath = "m"\nreplicas = [1, 4]\n[[models]]\npath = "smollm2-135m-instruct"\n')
    assert [entry.path for entry in found.models] == [str(tmp_path / "m"), "smollm2-135m-instruct"]
    assert found.models[0].replicas == (1, 4) and found.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "did you mean 'port'"),
        ("[[models]]\npath = 'm'\nreplica = 1", "models[0].replica: unknown key; did you mean 'replicas'?"),
        ("[[models]]\nname = 'm'", "models[0].path: missing"),
        ("[[models]]\npath = 'm'\nreplicas = 0", "replicas should be 1 or more"),
        ("port = 0", "port: input should be greater than or equal to 1"),
        ("host = '0.0.0.0'", "access.keys names no file"),
        ("[access]\ntls_key = 'k'", "belong together"),
        ("port = ", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        load(tmp_path, text)


def test_more_than_this_machine_is_served_with_keys_or_when_asked_to(tmp_path: Path) -> None:
    assert load(tmp_path, "host = '0.0.0.0'\n[access]\nopen = true").host == "0.0.0.0"
    assert load(tmp_path, "host = '0.0.0.0'\n[access]\nkeys = 'keys.json'").access.keys == "keys.json"


def test_ray_serves_own_file_is_valid_and_has_every_model(folders: dict[str, Path]) -> None:
    app = pytest.importorskip("serve.app")
    from ray.serve.schema import ServeDeploySchema

    models: Any = [{"path": str(folder), "name": name} for name, folder in folders.items()]
    written = app.applications(config.check({"models": models}, "here"))
    schema = ServeDeploySchema.model_validate(written)
    assert [application.name for application in schema.applications] == [*folders, "gateway"]
    gateway = config.GatewaySettings.model_validate(written["applications"][-1]["args"])
    assert [model.model_type for model in gateway.models] == list(folders)


def test_two_models_cannot_have_one_name(folders: dict[str, Path]) -> None:
    app = pytest.importorskip("serve.app")
    entries: Any = [{"path": str(folders["reranker"]), "name": "a"}, {"path": str(folders["embeddings"]), "name": "a"}]
    with pytest.raises(InputError, match="called 'a'"):
        app.settings_of(config.check({"models": entries}, "here"))


def test_models_of_one_base_are_one_application(folders: dict[str, Path], tmp_path: Path, tiny_model: Path) -> None:
    app = pytest.importorskip("serve.app")
    pytest.importorskip("vllm")
    adapted = served_models.write_adapted(tmp_path, tiny_model, 2)
    models: Any = [{"path": str(folder), "name": name, "base": str(tiny_model)} for name, folder in adapted.items()]
    models.append({"path": str(folders["extractor"]), "name": "extractor"})
    written = app.applications(config.check({"models": models}, "here"))
    assert [each["name"] for each in written["applications"]] == ["shared-adapted-0", "extractor", "gateway"]
    gateway = config.GatewaySettings.model_validate(written["applications"][-1]["args"])
    assert [model.application for model in gateway.models] == ["shared-adapted-0", "shared-adapted-0", ""]


def test_a_base_that_a_model_was_not_trained_from_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    app = pytest.importorskip("serve.app")
    pytest.importorskip("vllm")
    folder = served_models.write_adapted(tmp_path, tiny_model, 1)["adapted-0"]
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * 2}, other / "model.safetensors")
    models: Any = [{"path": str(folder), "name": "adapted-0", "base": str(other)}]
    with pytest.raises(InputError, match="was not trained from"):
        app.settings_of(config.check({"models": models}, "here"))


@pytest.mark.parametrize(
    ("model", "said"),
    [("extractor", "has no adapters beside its weights"), ("embeddings", "cannot share a base")],
)
def test_what_has_no_adapters_shares_no_base(folders: dict[str, Path], model: str, said: str) -> None:
    app = pytest.importorskip("serve.app")
    models: Any = [{"path": str(folders[model]), "name": model, "base": "tiny"}]
    with pytest.raises(InputError, match=said):
        app.settings_of(config.check({"models": models}, "here"))


def test_models_on_one_machine_share_its_cores() -> None:
    app = pytest.importorskip("serve.app")
    entries = [config.ModelEntry(path="p", name=name, base=base) for name, base in (("a", "x"), ("b", "x"), ("c", ""))]
    entries.append(config.ModelEntry(path="p", name="d", threads=7, replicas=(2, 4)))
    app.share_cores(entries, 8)
    assert [entry.threads for entry in entries] == [2, 2, 2, 7]
    app.share_cores(lone := [config.ModelEntry(path="p", name="a")], 8)
    assert lone[0].threads == 8


def test_limits_above_what_is_carried_to_a_replica_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
    config.check({}, "here")
    for raw in ({"limits": {"body_mib": 600}}, {"images": {"fetch": True, "most": 50}}):
        with pytest.raises(InputError, match=name):
            config.check(raw, "here")
    monkeypatch.setenv(name, str(2**31 - 1))
    config.check({"limits": {"body_mib": 600}}, "here")
    monkeypatch.setenv(name, str(4 * 2**20))
    with pytest.raises(InputError, match="body_mib = 20"):
        config.check({}, "here")
