"""Which models are to be served: those that have the alias `champion` in MLflow's registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from srl_rlvr.errors import InputError
from srl_rlvr.examples.names import nearest
from srl_rlvr.registry.tracking import client_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

CHAMPION_ALIAS = "champion"


def find(runs: Path, *names: str) -> dict[str, Path]:
    """The folder of each champion by its name, of these names or of all, in the store that `runs` are kept in.

    Raises InputError where the store does not answer, or has no such champion.
    """
    with client_of(runs.absolute(), "give --model FOLDER") as client:
        known = [model.name for model in _registered(client) if CHAMPION_ALIAS in model.aliases]
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            raise InputError(f"the registry has no champion of '{unknown}'{nearest(unknown, known)}")
        return {name: _folder(client, name) for name in names or known}


def _registered(client: MlflowClient) -> Iterator[RegisteredModel]:
    """All models, page by page."""
    token = None
    while True:
        page = client.search_registered_models(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _folder(client: MlflowClient, name: str) -> Path:
    """Where it lies on this machine, fetched if it does not."""
    source = client.get_model_version_by_alias(name, CHAMPION_ALIAS).source or ""
    place = urlsplit(source)
    if place.scheme in ("", "file"):
        return Path(unquote(place.path))
    from mlflow import artifacts

    return Path(artifacts.download_artifacts(source))
