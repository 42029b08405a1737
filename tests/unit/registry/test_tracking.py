import shutil
import sqlite3
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from srl_rlvr.config import RunConfig, parse
from srl_rlvr.errors import InputError
from srl_rlvr.registry.tracking import NEWEST_ALIAS, MlflowTracker, NullTracker, make_tracker

needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is an extra")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def config() -> RunConfig:
    tree = {
        "name": "sums",
        "data": [{"family": "chain_sum", "params": {"digits?": 2}}],
        "stages": [{"kind": "sft"}, {"kind": "rlvr", "name": "rlvr-long", "steps": 7}],
    }
    return parse(tree, "test")


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture(scope="module")
def migrated(tmp_path_factory) -> Path:
    """A new MLflow database: its migrations take seconds, so the tests share one."""
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("migrated") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracker(tmp_path, warnings, migrated) -> MlflowTracker:
    (tmp_path / "out").mkdir()
    shutil.copy(migrated, tmp_path / "out" / "mlflow.db")
    return MlflowTracker(tmp_path / "out" / "sums", warnings.append)


def client(tmp_path: Path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def test_tracking_that_is_off_does_nothing(config, tmp_path, warnings) -> None:
    config.tracking.mlflow = False
    tracker = make_tracker(config, tmp_path / "out" / "sums", warnings.append)
    assert isinstance(tracker, NullTracker)
    assert tracker.start(config) == ""
    tracker.log_metrics({"reward": 1.0}, 0)
    tracker.end("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_recorded_beside_its_folder(config, tracker, tmp_path, warnings) -> None:
    report = tmp_path / "report.html"
    report.write_text("page")
    run_id = tracker.start(config)
    tracker.log_metrics({"reward": 0.5, "kl": None}, 0)
    tracker.log_artifacts([report])
    tracker.end("FINISHED")

    run = client(tmp_path).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"reward": 0.5}
    assert run.data.params["stages.rlvr-long.steps"] == "7"
    assert run.data.params["data.0.params.digits_"] == "2"
    assert (tmp_path / "out" / "mlartifacts" / run_id / "artifacts" / "report.html").read_text() == "page"
    assert warnings == []


def test_a_resumed_run_continues_under_its_id(config, tracker, tmp_path, warnings) -> None:
    run_id = tracker.start(config)
    tracker.log_metrics({"reward": 0.5}, 0)
    tracker.end("KILLED")
    resumed = MlflowTracker(tmp_path / "out" / "sums", warnings.append)
    assert resumed.start(config, run_id) == run_id
    assert client(tmp_path).get_run(run_id).info.status == "RUNNING"
    resumed.log_metrics({"reward": 0.6}, 1)
    assert [m.value for m in client(tmp_path).get_metric_history(run_id, "reward")] == [0.5, 0.6]


def test_a_run_that_was_deleted_is_begun_anew(config, tracker, warnings) -> None:
    assert tracker.start(config, "0" * 32) != "0" * 32
    assert len(warnings) == 1 and "is gone" in warnings[0]


def test_a_run_that_was_put_into_the_bin_is_begun_anew(config, tracker, tmp_path, warnings) -> None:
    run_id = tracker.start(config)
    client(tmp_path).delete_run(run_id)
    assert tracker.start(config, run_id) != run_id
    assert len(warnings) == 1 and "is gone" in warnings[0]


def test_a_local_model_is_registered_by_reference(config, tracker, tmp_path) -> None:
    model_dir = tmp_path / "out" / "sums" / "model"
    model_dir.mkdir(parents=True)
    (model_dir / "model.safetensors").write_bytes(b"weights")
    run_id = tracker.start(config)
    for _ in range(2):
        tracker.log_model(model_dir, {"base": "smollm2"})
    version = client(tmp_path).get_model_version_by_alias("sums", NEWEST_ALIAS)
    assert (version.version, version.run_id, version.source) == (2, run_id, model_dir.as_uri())
    assert client(tmp_path).get_run(run_id).data.tags["model_path"] == str(model_dir)
    stored = tmp_path / "out" / "mlartifacts" / run_id / "artifacts" / "model"
    assert [path.name for path in stored.iterdir()] == ["model_card.json"], "the weights are not copied"


def test_a_lost_store_costs_one_warning_and_no_metric(config, tracker, tmp_path, warnings, monkeypatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    run_id = tracker.start(config)

    def lost(*_: object, **__: object) -> None:
        raise MlflowException("API request to http://x failed with exception [Errno 111] Connection refused")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_batch", lost)
        tracker.log_metrics({"reward": 0.1}, 0)
        tracker.log_metrics({"reward": 0.2}, 1)
    assert len(warnings) == 1 and "the run goes on: cannot be reached (connection refused)" in warnings[0]
    tracker.log_metrics({"reward": 0.3}, 2)
    assert [m.value for m in client(tmp_path).get_metric_history(run_id, "reward")] == [0.1, 0.2, 0.3]


@needs_mlflow
def test_a_server_that_is_away_is_named_in_seconds(config, tmp_path, warnings, monkeypatch) -> None:
    import mlflow.entities  # noqa: F401  # not part of the wait

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        MlflowTracker(tmp_path / "sums", warnings.append).start(config)
    message = str(caught.value)
    assert message.startswith("MLflow at http://127.0.0.1:9: cannot be reached (connection refused); start the server")
    assert "secret" not in message and "\n" not in message
    assert time.monotonic() - started < 10


def test_a_file_that_is_no_database_is_named_at_once(config, tracker, tmp_path) -> None:
    (tmp_path / "out" / "mlflow.db").write_text("no database " * 100)
    with pytest.raises(InputError, match="file is not a database"):
        tracker.start(config)


@needs_mlflow
def test_the_database_is_made_where_there_is_none(config, tmp_path, warnings, capfd) -> None:
    MlflowTracker(tmp_path / "out" / "sums", warnings.append).start(config)
    with sqlite3.connect(tmp_path / "out" / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)
    assert capfd.readouterr() == ("", ""), "nothing is printed"
