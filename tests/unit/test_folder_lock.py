from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def written(out: Path, **changes: Any) -> None:
    """A lock file that another process left, and the kernel does not hold."""
    with folder_lock.locked(out):
        found = json.loads((out / folder_lock.NAME).read_text())
    out.mkdir(exist_ok=True)
    (out / folder_lock.NAME).write_text(json.dumps(found | changes))


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
        assert json.loads((out / folder_lock.NAME).read_text())["pid"] == os.getpid()


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


@pytest.mark.parametrize(
    ("changes", "is_free"),
    [
        ({}, False),  # this very process, by its pid and start, on a file system without locks
        ({"started": 1.0}, True),  # its pid belongs to another process by now
        ({"pid": 2**22 + 1}, True),
        ({"host": "elsewhere"}, False),  # it was renewed just now
    ],
)
def test_without_the_kernels_lock_the_process_decides(out: Path, changes: dict[str, Any], is_free: bool) -> None:
    written(out, **changes)
    if is_free:
        with folder_lock.locked(out):
            pass
    else:
        with pytest.raises(InputError, match="is in use by process"), folder_lock.locked(out):
            pass


def test_a_holder_on_another_machine_that_no_longer_renews_is_succeeded(out: Path) -> None:
    written(out, host="elsewhere")
    old = time.time() - 1000
    os.utime(out / folder_lock.NAME, (old, old))
    with folder_lock.locked(out):
        assert [path.name for path in out.iterdir()] == [folder_lock.NAME]


def test_the_holder_renews_its_file(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_RENEW_EVERY_S", 0.02)
    with folder_lock.locked(out):
        old = time.time() - 1000
        os.utime(out / folder_lock.NAME, (old, old))
        end = time.monotonic() + 5
        while (out / folder_lock.NAME).stat().st_mtime < old + 500:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_file_that_a_crash_left_without_a_name_is_taken_over(
    out: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "_WRITE_DEADLINE_S", 0.05)
    out.mkdir()
    (out / folder_lock.NAME).write_text(content)
    with folder_lock.locked(out):
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
