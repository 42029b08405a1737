"""No disk left at a checkpoint: one line, nothing half-written passes for a checkpoint, and the run can go on."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Command, same_results

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def wait_for(folder: Path, deadline_s: float = 300.0) -> None:
    end = time.monotonic() + deadline_s
    while not folder.is_dir():
        assert time.monotonic() < end, f"no {folder} within {deadline_s:.0f} s"
        time.sleep(0.01)


def test_a_full_disk_ends_the_run_in_one_line_and_resume_goes_on(undisturbed: Any, small_disk: Path) -> None:
    out = small_disk / "out"
    run = Command(["train", undisturbed.run_file, "--out", out], small_disk.parent)
    wait_for(out / "checkpoints" / "update-000002-stage-1")  # two updates before the next one
    filler = small_disk / "filler"
    with filler.open("wb") as stream:
        stream.write(b"\0" * (shutil.disk_usage(small_disk).free - 300_000))
    finished = run.finish()
    assert finished.code == 1
    assert len(finished.err.splitlines()) == 1
    assert finished.err.startswith(f"error: cannot write checkpoint {out}/checkpoints/update-000004-stage-1: ")
    assert "the last good one is update-000002-stage-1" in finished.err
    assert "--resume" in finished.err
    assert [entry.name for entry in (out / "checkpoints").iterdir()] == ["update-000002-stage-1"]
    assert finished.survivors() == []

    filler.unlink()
    again = Command(["train", undisturbed.run_file, "--out", out, "--resume"], small_disk.parent).finish()
    assert again.code == 0, again.err
    same_results(out, undisturbed.out)
