from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from srl_rlvr import checkpoints
from srl_rlvr.checkpoints import History, State
from srl_rlvr.errors import InputError, RunError


def save_learner(folder: Path) -> None:
    (folder / "learner.pt").write_bytes(b"weights")


def write(out: Path, version: int, stage: int = 0) -> Path:
    return checkpoints.write(out, State(stage=stage, version=version), History(), "{}\n", save_learner)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = State(
        stage=1, step=3, selector={"cursor": 17}, version=12, sampled_tokens=999, seconds=4.5, peak_memory_gib=2.25,
        held_out={"base": [0.5, 0.25, 0.75]}, best_step=2, best_score=0.5, tracking_id="run-7", pending=[[1, 2]],
        rollouts=64, dev_scores=[[2, 0.5]], base="b",
    )  # fmt: skip
    history = History([{"stage": "sft", "step": 0, "loss": 0.5}, {"stage": "srl", "step": 0, "reward": 0.25}])
    folder = checkpoints.write(tmp_path, state, history, '{"seed": 0}\n', save_learner)
    assert checkpoints.read(folder) == (state, history) and checkpoints.read_state(folder) == state
    assert checkpoints.latest(tmp_path) == folder
    assert (folder / "learner.pt").read_bytes() == b"weights" and (folder / "config.json").is_file()


def test_only_the_last_two_are_kept(tmp_path: Path) -> None:
    for version in (1, 9, 10, 11):
        write(tmp_path, version)
    assert names(tmp_path) == ["update-000010-stage-0", "update-000011-stage-0"]
    write(tmp_path, 11, stage=1)
    assert names(tmp_path) == ["update-000011-stage-0", "update-000011-stage-1"]


def test_a_checkpoint_of_the_same_update_replaces_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, 3)
    checkpoints.write(tmp_path, State(step=5, version=3), History(), "{}\n", save_learner)
    folder = checkpoints.latest(tmp_path)
    assert folder is not None and checkpoints.read(folder)[0].step == 5 and len(names(tmp_path)) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RunError("learner, save: disk full\nmore")])
def test_a_failure_while_writing_leaves_nothing_and_keeps_the_older_ones(tmp_path: Path, error: Exception) -> None:
    def fail(folder: Path) -> None:
        save_learner(folder)
        raise error

    write(tmp_path, 1)
    write(tmp_path, 2)
    with pytest.raises(RunError, match="cannot write checkpoint .*GiB free.*last good one is .*--resume") as caught:
        checkpoints.write(tmp_path, State(version=3), History(), "{}\n", fail)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["update-000001-stage-0", "update-000002-stage-0"]


def test_a_folder_that_cannot_be_made_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(RunError, match="cannot write checkpoint .*there is none yet") as caught:
        write(tmp_path, 1)
    assert "\n" not in str(caught.value)


def test_what_a_killed_run_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "checkpoints" / ".update-000002-stage-0").mkdir()
    latest = checkpoints.latest(tmp_path)
    assert latest is not None and latest.name == "update-000001-stage-0"
    write(tmp_path, 2)
    assert names(tmp_path) == ["update-000001-stage-0", "update-000002-stage-0"]


def test_best_weights_that_cannot_be_written_leave_the_better_ones_of_before(tmp_path: Path) -> None:
    checkpoints.write_best(tmp_path, 3, save_learner)

    def fails(folder: Path) -> None:
        (folder / "learner.pt").write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(RunError, match="cannot write checkpoint .*best-000004: No space left .*go on with --resume"):
        checkpoints.write_best(tmp_path, 4, fails)
    assert [path.name for path in tmp_path.iterdir()] == ["best-000003"]
    assert (tmp_path / "best-000003" / "learner.pt").read_bytes() == b"weights"


def test_the_best_of_the_newest_checkpoint_stands_until_there_is_a_newer_one(tmp_path: Path) -> None:
    def bests() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("best-*"))

    first = checkpoints.write_best(tmp_path, 1, save_learner)
    checkpoints.write(tmp_path, State(version=2, best=first), History(), "{}\n", save_learner)
    for version in (3, 4):
        newer = checkpoints.write_best(tmp_path, version, save_learner)
        assert bests() == [first, newer]
    checkpoints.write(tmp_path, State(version=5, best=newer), History(), "{}\n", save_learner)
    assert bests() == [newer]


def test_the_tenth_stage_comes_after_the_ninth(tmp_path: Path) -> None:
    for stage in (8, 9, 10):
        folder = write(tmp_path, 20, stage)
        assert checkpoints.latest(tmp_path) == folder


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path) is None


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 2, "unheard_of": 1}'])
def test_a_state_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path, 1)
    (folder / "state.json").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read: .*; delete it to go on from the one before") as caught:
        checkpoints.read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["state.json", "metrics.parquet"])
def test_a_missing_or_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 1)
    (folder / name).write_bytes(b"PAR1 damaged")
    with pytest.raises(InputError, match="cannot be read"):
        checkpoints.read(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        checkpoints.read(folder)


def test_metrics_that_a_stage_does_not_have_are_null_there() -> None:
    table = History(
        [{"stage": "sft", "step": 0, "loss": 0.5}, {"stage": "srl", "step": 0, "reward": 1.0}]
    ).metrics_table()
    assert table.to_pydict() == {"stage": ["sft", "srl"], "step": [0, 0], "loss": [0.5, None], "reward": [None, 1.0]}


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    del state["format"]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="another version of srl-rlvr: .*--out") as caught:
        checkpoints.read(folder)
    assert "\n" not in str(caught.value)


def test_the_best_weights_ask_for_the_state_alone(tmp_path: Path) -> None:
    """It is written often, and metrics are long."""
    folder = checkpoints.write(tmp_path, State(version=1, best="best-000001"), History(), "{}\n", save_learner)
    checkpoints.write_best(tmp_path, 1, save_learner)
    (folder / "metrics.parquet").unlink()
    checkpoints.write_best(tmp_path, 2, save_learner)
    assert sorted(path.name for path in tmp_path.glob("best-*")) == ["best-000001", "best-000002"]


@pytest.mark.parametrize("moment", range(5))
def test_a_crash_while_one_of_the_same_name_is_replaced_leaves_one_of_them(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies before the n-th change of the file system; what is started next finds the old or the new."""
    write(tmp_path, 3)
    changes = iter(range(100))

    class DiedError(BaseException):
        pass

    def dying(change: Any) -> Any:
        def instead(*given: Any, **named: Any) -> Any:
            if next(changes) >= moment:
                raise DiedError
            return change(*given, **named)

        return instead

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(checkpoints.shutil, "rmtree", dying(checkpoints.shutil.rmtree))
        with contextlib.suppress(DiedError):
            checkpoints.write(tmp_path, State(step=5, version=3), History(), "{}\n", save_learner)
    checkpoints.recover(tmp_path)
    assert names(tmp_path) == ["update-000003-stage-0"]
    folder = checkpoints.latest(tmp_path)
    assert folder is not None and checkpoints.read(folder)[0].step in (0, 5)
    assert (folder / "learner.pt").read_bytes() == b"weights"


def test_an_old_checkpoint_that_is_half_deleted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (1, 2):
        write(tmp_path, version)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *given, **named: None)  # died before it, or could not
    write(tmp_path, 3)
    monkeypatch.undo()
    checkpoints.recover(tmp_path)
    assert names(tmp_path) == ["update-000002-stage-0", "update-000003-stage-0"]
