from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_runs import Finished, srl_rlvr, write_run
from gateway_fixtures import address, folders, replicas, settings

__all__ = ["address", "folders", "replicas", "settings", "trained"]


@dataclass
class Trained:
    """A run that nothing disturbed: its run file, its folder, what the command printed."""

    run_file: Path
    out: Path
    finished: Finished


@pytest.fixture(scope="session")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """SFT, SRL and RLVR with MLflow on, once for all tests that only look at what a run leaves."""
    folder = tmp_path_factory.mktemp("trained")
    run_file = write_run(folder, tiny_model)
    finished = srl_rlvr("train", run_file, "--out", "out", "--set", "tracking.mlflow=true", cwd=folder)
    assert finished.code == 0, finished.err
    return Trained(run_file, folder / "out", finished)
