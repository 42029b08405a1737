from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_runs import srl_rlvr, write_run
from gateway_fixtures import folders

__all__ = ["Undisturbed", "folders", "undisturbed"]


@dataclass
class Undisturbed:
    run_file: Path
    out: Path


@pytest.fixture(scope="session")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What the disturbed runs have to end as, bit for bit."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_file = write_run(folder, tiny_model)
    finished = srl_rlvr("train", run_file, "--out", "out", cwd=folder)
    assert finished.code == 0, finished.err
    return Undisturbed(run_file, folder / "out")
