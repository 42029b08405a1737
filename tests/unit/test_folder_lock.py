from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from srl_rlvr import folder_lock
from srl_rlvr.errors import InputError

HOLD = """
import sys
from pathlib import Path
from srl_rlvr.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def holder(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_in_use_is_refused_at_once_and_names_who_holds_it(out: Path, holder: subprocess.Popen[str]) -> None:
    began = time.monotonic()
    with (
        pytest.raises(InputError, match=rf"in use by process {holder.pid} on .*--out") as caught,
        folder_lock.locked(out),
    ):
        pass
    assert time.monotonic() - began < 1 and "\n" not in str(caught.value)
    assert (out / folder_lock.NAME).is_file()


def test_a_holder_that_was_killed_is_succeeded(out: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with folder_lock.locked(out):
        assert (out / folder_lock.NAME).read_text().startswith(f"{os.getpid()}\n")


def test_what_ends_leaves_no_lock_and_no_empty_folder(out: Path) -> None:
    with folder_lock.locked(out):
        pass
    assert not out.exists()
    with folder_lock.locked(out):
        (out / "config.json").touch()
    assert [path.name for path in out.iterdir()] == ["config.json"]
    with pytest.raises(RuntimeError), folder_lock.locked(out):
        raise RuntimeError
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    with folder_lock.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("pid", "host", "is_free"), [(2**22 + 1, "", True), (2**22 + 1, "elsewhere", False)])
def test_a_holder_that_died_is_succeeded_on_its_own_machine(out: Path, pid: int, host: str, is_free: bool) -> None:
    with folder_lock.locked(out):
        here = (out / folder_lock.NAME).read_text().splitlines()[1]
    out.mkdir()
    (out / folder_lock.NAME).write_text(f"{pid}\n{host or here}\n")
    if is_free:
        with folder_lock.locked(out):
            pass
    else:
        with pytest.raises(InputError, match=f"in use by process {pid} on elsewhere"), folder_lock.locked(out):
            pass


def test_of_many_that_start_at_once_one_goes_on(out: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(out)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(6)
    ]  # fmt: skip
    first = [process.stdout.readline() for process in processes]  # type: ignore[union-attr]
    for process in processes:
        process.kill()
    errors = [process.communicate()[1] for process in processes]
    assert sorted(first) == ["", "", "", "", "", "held\n"]
    assert sum(bool(re.search("InputError: .* is in use by", error)) for error in errors) == 5


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to .*--out"), folder_lock.locked(tmp_path / "file"):
        pass
