from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from srl_rlvr.errors import InputError
from srl_rlvr.registry import champions

mlflow = pytest.importorskip("mlflow")


class Store:
    """A local registry, with `downloads` of what lies elsewhere."""

    def __init__(self, runs: Path, client: Any):
        self.runs, self.downloads, self.broken, self.client = runs, list[str](), False, client
        self.client.create_registered_model("router")

    def champion(self, source: str) -> champions.Champion:
        version = self.client.create_model_version("router", source, await_creation_for=0)
        self.client.set_registered_model_alias("router", "champion", version.version)
        return champions.find(self.runs, "router")["router"]

    def download(self, uri: str, dst_path: str, **_: Any) -> str:
        self.downloads.append(uri)
        found = Path(dst_path) / "model"
        found.mkdir(parents=True)
        (found / "config.json").write_text("{}")
        if self.broken:
            raise ConnectionError("the line is dead\nand more")
        return str(found)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the registry's database, which takes seconds to make."""
    return tmp_path_factory.mktemp("registry")


@pytest.fixture
def store(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = Store(runs, mlflow.MlflowClient(f"sqlite:///{runs}/mlflow.db", f"sqlite:///{runs}/mlflow.db"))
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", found.download)
    yield found
    found.client.delete_registered_model("router")


def test_a_version_that_lies_elsewhere_is_downloaded_once(store: Store, tmp_path: Path) -> None:
    first = store.champion("mlflow-artifacts:/1/models/a")
    assert store.downloads == []
    folders = {champions.fetch(champions.find(store.runs)["router"], tmp_path / "cache") for _ in range(3)}
    assert len(folders) == 1 and (folders.pop() / "config.json").is_file()
    assert store.downloads == ["mlflow-artifacts:/1/models/a"] and champions.find(store.runs)["router"] == first
    second = store.champion("mlflow-artifacts:/1/models/a")  # the same place, another version
    assert second != first and second.version == "2"
    assert champions.fetch(second, tmp_path / "cache") != champions.fetch(first, tmp_path / "cache")
    assert len(store.downloads) == 2


def test_a_download_that_breaks_off_leaves_nothing_and_is_made_again(store: Store, tmp_path: Path) -> None:
    champion = store.champion("s3://bucket/model")
    store.broken = True
    with pytest.raises(InputError, match="version 1 of 'router'.*s3://bucket/model.*the line is dead$"):
        champions.fetch(champion, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    store.broken = False
    assert (champions.fetch(champion, tmp_path / "cache") / "config.json").is_file()


def test_a_version_on_this_machine_is_served_from_where_it_lies(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "with blank" / "model"
    folder.mkdir(parents=True)
    first = store.champion(folder.as_uri())
    assert champions.fetch(first, tmp_path / "cache") == folder
    second = store.champion(folder.as_uri())  # trained anew into the same folder
    assert second != first and champions.fetch(second, tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists() and store.downloads == []


def test_versions_of_a_registry_that_was_made_anew_are_others(store: Store, tmp_path: Path) -> None:
    first = store.champion("s3://bucket/model")
    champions.fetch(first, tmp_path / "cache")
    store.client.delete_registered_model("router")
    store.client.create_registered_model("router")
    second = store.champion("s3://bucket/model")
    assert second.version == first.version and second != first
    champions.fetch(second, tmp_path / "cache")
    assert len(store.downloads) == 2


@pytest.mark.parametrize("name", ["..", "a/b", "名前" * 100, 'it\'s "so"'])
def test_names_of_any_kind_stay_in_the_cache(name: str, store: Store, tmp_path: Path) -> None:
    champion = champions.Champion(name, "1", 1, "s3://bucket/model", "sqlite:///x")
    assert champions.fetch(champion, tmp_path / "cache").parent == tmp_path / "cache"
