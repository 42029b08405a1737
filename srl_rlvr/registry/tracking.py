"""Runs and models in MLflow: parameters, metrics, files, and one registered model version a run.

It is handed a config, numbers and paths; it must not know stages or policies. MLflow is imported when a run
starts, because that takes seconds. A tracking server that is away at the start stops the run before it costs
anything; one that goes away later does not.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from srl_rlvr.config import RunConfig
from srl_rlvr.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

NEWEST_ALIAS = "newest"  # `latest` is reserved by MLflow

_START_TIMEOUT_S = 10  # a server that has just been started needs seconds for its first answer
_STEP_TIMEOUT_S = 5
_UPLOAD_TIMEOUT_S = 120
_LONGEST_PARAM = 6000
_PARAMS_PER_CALL = 100
_METRICS_PER_CALL = 1000


class Tracker(Protocol):
    def start(self, config: RunConfig, run_id: str | None = None) -> str:
        """Begin a run, or continue `run_id`; return its id. Raises InputError: the store cannot be reached."""
        ...

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Record one update; `step` counts over the whole run. None is left out."""
        ...

    def log_artifacts(self, paths: Sequence[Path]) -> None:
        """Keep files and folders with the run."""
        ...

    def log_model(self, model_dir: Path, card: Mapping[str, Any]) -> None:
        """Record the trained model and register it as a new version of the model named like the run."""
        ...

    def end(self, status: Status) -> None: ...


def make_tracker(config: RunConfig, out: Path, warn: Callable[[str], None]) -> Tracker:
    """The tracker that `config` asks for. `out` is the run's folder; `warn` is told once if the store goes away."""
    return MlflowTracker(out, warn) if config.tracking.mlflow else NullTracker()


class NullTracker:
    def start(self, config: RunConfig, run_id: str | None = None) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        pass

    def log_artifacts(self, paths: Sequence[Path]) -> None:
        pass

    def log_model(self, model_dir: Path, card: Mapping[str, Any]) -> None:
        pass

    def end(self, status: Status) -> None:
        pass


class MlflowTracker:
    """Logs to MLFLOW_TRACKING_URI, else to `mlflow.db` and `mlartifacts/` beside the run's folder."""

    _client: MlflowClient

    def __init__(self, out: Path, warn: Callable[[str], None]):
        self._parent = out.absolute().parent
        self._warn = warn
        self._warned = False
        self._uri = _store(self._parent)
        self._run_id = ""
        self._artifact_uri = ""
        self._model_name = ""
        self._unsent: list[Any] = []

    def start(self, config: RunConfig, run_id: str | None = None) -> str:
        self._model_name = re.sub(r"[/:]", "-", config.name)
        with client_of(self._parent, "run with --set tracking.mlflow=false") as self._client:
            run = self._continued(run_id) or self._created(config)
        self._run_id, self._artifact_uri = run.info.run_id, run.info.artifact_uri
        return self._run_id

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._unsent += [Metric(_key(k), float(v), now_ms, step) for k, v in metrics.items() if v is not None]
        with self._tolerating_loss(_STEP_TIMEOUT_S):
            # What a lost connection held back goes out with the next step.
            while self._unsent:
                self._client.log_batch(self._run_id, metrics=self._unsent[:_METRICS_PER_CALL])
                del self._unsent[:_METRICS_PER_CALL]

    def log_artifacts(self, paths: Sequence[Path]) -> None:
        with self._tolerating_loss(_UPLOAD_TIMEOUT_S, Exception):  # each artifact store raises its own
            for path in paths:
                if path.is_dir():
                    self._client.log_artifacts(self._run_id, str(path), path.name)
                else:
                    self._client.log_artifact(self._run_id, str(path))

    def log_model(self, model_dir: Path, card: Mapping[str, Any]) -> None:
        """On a local disk the store gets the card and the model's path; a remote store gets the whole folder.

        Either way it becomes a version of the registered model that is named like the run, with the alias `newest`.
        """
        with self._tolerating_loss(_UPLOAD_TIMEOUT_S, Exception):  # each artifact store raises its own
            if urlsplit(self._artifact_uri).scheme not in ("", "file"):
                self._client.log_artifacts(self._run_id, str(model_dir), "model")
            self._client.log_text(self._run_id, json.dumps(dict(card), indent=2, default=str), "model/model_card.json")
            self._client.set_tag(self._run_id, "model_path", str(model_dir.absolute()))
            self._register(model_dir)

    def end(self, status: Status) -> None:
        self.log_metrics({}, 0)
        with self._tolerating_loss(_STEP_TIMEOUT_S):
            self._client.set_terminated(self._run_id, status)

    def _continued(self, run_id: str | None) -> Any:
        from mlflow.exceptions import MlflowException

        if not run_id:
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage == "deleted":
            self._warn(f"MLflow run {run_id} is gone from {without_password(self._uri)}: a new one was started")
            return None
        self._client.update_run(run_id, status="RUNNING")
        return run

    def _created(self, config: RunConfig) -> Any:
        from mlflow.entities import Param

        run = self._client.create_run(self._experiment_id(config.tracking.experiment), run_name=config.name)
        params = [Param(_key(k), v[:_LONGEST_PARAM]) for k, v in _flat(config.model_dump(mode="json"))]
        for first in range(0, len(params), _PARAMS_PER_CALL):
            self._client.log_batch(run.info.run_id, params=params[first : first + _PARAMS_PER_CALL])
        return run

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            # A server knows its own artifact store; without one, files belong beside the database.
            location = (self._parent / "mlartifacts").as_uri() if self._uri.startswith("sqlite:") else None
            try:
                return self._client.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self._client.get_experiment_by_name(name)  # another run created it meanwhile
        assert experiment is not None
        return experiment.experiment_id

    def _register(self, model_dir: Path) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self._model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # A server refuses sources outside its artifact store; a database of our own may point at the model itself.
        local = self._uri.startswith("sqlite:") and urlsplit(self._artifact_uri).scheme in ("", "file")
        source = model_dir.absolute().as_uri() if local else f"runs:/{self._run_id}/model"
        version = self._client.create_model_version(self._model_name, source, self._run_id, await_creation_for=0)
        self._client.set_registered_model_alias(self._model_name, NEWEST_ALIAS, version.version)

    @contextmanager
    def _tolerating_loss(self, timeout_s: int, *also: type[Exception]) -> Iterator[None]:
        """A store that goes away in the middle must not cost the run: one warning, and training goes on."""
        from mlflow.exceptions import MlflowException

        try:
            with patience(timeout_s):
                yield
        except (MlflowException, OSError, *also) as error:
            if not self._warned:
                self._warned = True
                where = without_password(self._uri)
                self._warn(f"MLflow at {where} does not answer; the run goes on: {first_line(error)}")


@contextmanager
def client_of(parent: Path, otherwise: str) -> Iterator[MlflowClient]:
    """A client of the store that the runs in `parent` are kept in, while it is first asked.

    Raises InputError, which ends with what to do `otherwise`, where it does not answer.
    """
    client_class = _import_client()
    from mlflow.exceptions import MlflowException

    uri = _store(parent)
    try:
        _check_database(uri)
        with patience(_START_TIMEOUT_S):
            yield client_class(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, OSError, sqlite3.Error) as error:
        raise InputError(
            f"MLflow at {without_password(uri)}: {first_line(error)}; start the server, correct "
            f"MLFLOW_TRACKING_URI, or {otherwise}"
        ) from None


def _store(parent: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{parent / 'mlflow.db'}"


def _import_client() -> type[MlflowClient]:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError as error:
        if error.name != "mlflow":
            raise
        raise MissingExtraError("mlflow", "mlflow") from None
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a new database announces each of its migrations
    return MlflowClient


@contextmanager
def patience(timeout_s: int) -> Iterator[None]:
    """MLflow's own patience is 120 s, seven times over; its only knob is the environment. What the user set stays."""
    wanted = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _check_database(uri: str) -> None:
    """Raise OSError or sqlite3.Error where MLflow would retry for 100 s before it gave up on a sqlite file."""
    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA schema_version")


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of every leaf; list entries by their name or kind, else by number."""
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        tree = {item.get("name") or item.get("kind") or str(i): item for i, item in enumerate(tree)}
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree if isinstance(tree, str) else json.dumps(tree)


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


def first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if re.search("failed with (timeout )?exception", text):
        cause = re.search(r"\[Errno -?\d+\] ([\w ]+)", text)
        return f"cannot be reached ({cause[1].lower() if cause else 'no answer'})"
    return without_password(text.splitlines()[0])


def without_password(uri: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", uri)
