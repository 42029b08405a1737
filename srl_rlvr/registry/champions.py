"""The models that are to be served: those with the alias `champion` in MLflow's registry, by name and version."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from srl_rlvr.errors import InputError
from srl_rlvr.examples.names import nearest
from srl_rlvr.registry import tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

CHAMPION_ALIAS = "champion"
_DOWNLOAD_TIMEOUT_S = 120
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Champion:
    """A version of a registered model. Two are equal if they are the same version."""

    name: str
    version: str
    created_ms: int  # a registry that was made anew counts its versions from 1 again
    source: str
    store: str  # the registry's address

    def __str__(self) -> str:
        return f"version {self.version} of '{self.name}'"


def find(runs: Path, *names: str) -> dict[str, Champion]:
    """Return each champion by its name, of these names or of all, in the store that `runs` are kept in.

    Nothing is downloaded. Raises InputError if the store does not answer, or has no such champion.
    """
    with tracking.client_of(runs.absolute(), "give --model FOLDER") as client:
        known = [model.name for model in _registered(client) if CHAMPION_ALIAS in model.aliases]
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            raise InputError(f"the registry has no champion of '{unknown}'{nearest(unknown, known)}")
        return {name: _champion(client, name) for name in names or known}


def fetch(champion: Champion, cache: Path) -> Path:
    """Return the version's folder on this machine: where it lies, or its download in `cache`, made once a version.

    Raises InputError if it cannot be downloaded.
    """
    place = urlsplit(champion.source)
    if place.scheme in ("", "file"):
        return Path(unquote(place.path))
    identity = f"{champion.store}\n{champion.name}\n{champion.version}\n{champion.created_ms}\n{champion.source}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = cache / f"{quote(champion.name, safe='')[:_LONGEST_NAME]}-{champion.version}-{digest}"
    try:
        with _alone(folder):
            if not folder.is_dir():
                _download(champion, folder)
    except OSError as error:
        raise InputError(f"cannot keep {champion} in {cache}: {error.strerror or error}") from None
    return folder


def _download(champion: Champion, folder: Path) -> None:
    """Under a hidden name until it is whole: a download that was broken off is begun anew."""
    from mlflow import artifacts

    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tracking.patience(_DOWNLOAD_TIMEOUT_S):
            found = artifacts.download_artifacts(
                champion.source, dst_path=str(partial), tracking_uri=champion.store, registry_uri=champion.store
            )
        os.rename(found, folder)
    except Exception as error:  # each artifact store raises its own
        source = tracking.without_password(champion.source)
        raise InputError(f"cannot download {champion} from {source}: {tracking.first_line(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time downloads this folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _registered(client: MlflowClient) -> Iterator[RegisteredModel]:
    """All models, page by page."""
    token = None
    while True:
        page = client.search_registered_models(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _champion(client: MlflowClient, name: str) -> Champion:
    version = client.get_model_version_by_alias(name, CHAMPION_ALIAS)
    return Champion(
        name=name,
        version=str(version.version),
        created_ms=int(version.creation_timestamp or 0),
        source=version.source or "",
        store=client.tracking_uri,
    )
