"""From where a run goes on."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from unit.scripted import problems

from srl_rlvr import checkpoints, cli, folder_lock, model_types, records
from srl_rlvr import config as configs
from srl_rlvr.checkpoints import History, State
from srl_rlvr.cli import session
from srl_rlvr.errors import InputError

RUN = {"name": "run", "data": [{"path": "x.jsonl"}], "stages": [{"kind": "rlvr"}]}


def test_a_run_that_was_begun_before_a_key_came_goes_on(tmp_path: Path) -> None:
    config = configs.parse(RUN, "run")
    before = json.loads(configs.dump(config))
    del before["data"][0]["ordered"], before["model"]["matmul"]
    checkpoints.write(tmp_path, State(version=3), History(), json.dumps(before), lambda folder: None)
    state, _, folder = session._starting_point(config, tmp_path, resume=True)
    assert state.version == 3 and folder == checkpoints.latest(tmp_path)
    other = configs.parse(RUN | {"seed": 1}, "run")
    with pytest.raises(InputError, match="was begun with another 'seed'"):
        session._starting_point(other, tmp_path, resume=True)


def test_a_run_whose_base_is_its_types_goes_on(tmp_path: Path) -> None:
    """Its checkpoints name the base, and its run file does not."""
    run = RUN | {"model_type": "reranker", "name": "goes on", "data": [{"path": str(tmp_path / "missing.jsonl")}]}
    config = configs.parse(run, "run")
    begun = config.model_copy(deep=True)
    begun.model.base = "all-minilm-l6-v2"
    checkpoints.write(tmp_path / "out", State(), History(), configs.dump(begun), lambda folder: None)
    with pytest.raises(InputError, match="missing.jsonl: no such file"):  # which comes after
        session.train(config, tmp_path / "out", resume=True, command="")


def test_what_goes_on_after_ctrl_c_is_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my run.toml").write_text('name = "r"\n[[data]]\npath = "x.jsonl"\n[[stages]]\nkind = "rlvr"\n')
    told: list[str] = []
    monkeypatch.setattr(session, "train", lambda config, out, resume, command: told.append(command) or 0)
    words = ["train", str(tmp_path / "my run.toml"), "--set", "seed=3", "--skip-bad", "--out", str(tmp_path / "o u t")]
    options = cli._parser().parse_args(words)
    assert options.run(options) == 0
    again = cli._parser().parse_args(shlex.split(told[0])[1:])
    assert again == argparse.Namespace(**vars(options) | {"resume": True})


def test_a_run_does_not_go_on_with_other_mathematics(tmp_path: Path) -> None:
    begun = configs.parse(RUN, "run")
    checkpoints.write(tmp_path, State(), History(), configs.dump(begun), lambda folder: None)
    session._starting_point(configs.parse(RUN | {"engine": {"call_deadline_s": 9000.0}}, "run"), tmp_path, resume=True)
    with pytest.raises(InputError, match="was begun with another 'think'"):
        session._starting_point(configs.parse(RUN | {"think": True}, "run"), tmp_path, resume=True)
    folder = checkpoints.latest(tmp_path)
    assert folder is not None
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="is damaged: delete it"):
        session._starting_point(begun, tmp_path, resume=True)


def test_a_run_does_not_go_on_with_other_problems(tmp_path: Path) -> None:
    state = State()
    given = problems(3), problems(1, first=10), problems(2, first=20)
    session._check_data(state, tmp_path, *given)
    session._check_data(state, tmp_path, *given)
    answered_otherwise = given[0].to_pylist()
    answered_otherwise[1]["reference"] = "7"
    other = records.build("Example", answered_otherwise)
    with pytest.raises(InputError, match="its data has changed") as caught:
        session._check_data(state, tmp_path, other, *given[1:])
    assert other["id"][1].as_py() in str(caught.value) and "another answer" in str(caught.value)
    (tmp_path / "problems.parquet").unlink()
    with pytest.raises(InputError, match="its data has changed; "):
        session._check_data(state, tmp_path, other, *given[1:])


def test_a_run_does_not_go_on_with_another_base(tiny_model: Path, tmp_path: Path) -> None:
    state = State()
    session._check_base(state, tmp_path, tiny_model)
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    session._check_base(state, tmp_path, moved)
    weights = load_file(moved / "model.safetensors")
    name = min(weights, key=lambda name: weights[name].numel())
    weights[name] += 1
    save_file(weights, moved / "model.safetensors")
    with pytest.raises(InputError, match="another base model"):
        session._check_base(state, tmp_path, moved)


def test_a_second_run_in_one_folder_ends_at_once(tmp_path: Path) -> None:
    with folder_lock.locked(tmp_path), pytest.raises(InputError, match=f"in use by process {os.getpid()} on "):
        session.train(configs.parse(RUN, "run"), tmp_path, resume=False, command="")


@pytest.mark.parametrize(
    ("name", "said"), [("numerik", "did you mean 'numeric'"), ("nowhere.checks:f", "there is no module nowhere.checks")]
)
def test_a_verifier_that_is_not_there_is_found_before_anything_starts(name: str, said: str) -> None:
    session._check_verifiers({"numeric", "json:loads"}, ["json:loads"])
    with pytest.raises(InputError, match=said):
        session._check_verifiers({name}, [name] if ":" in name else [])


def test_a_verifier_that_is_not_declared_is_refused_and_the_key_named() -> None:
    with pytest.raises(InputError, match=r'verifiers = \["os:system"\]'):
        session._check_verifiers({"os:system"}, ["json:loads"])


def test_looking_for_a_verifiers_module_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "marks_its_import" / "below"
    package.mkdir(parents=True)
    made = tmp_path / "made"
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text(f"open({str(made)!r}, 'w')\n")
    (package / "checks.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    session._check_verifiers(set(), ["marks_its_import.below.checks:right"])
    with pytest.raises(InputError, match="there is no module marks_its_import.below.cheks"):
        session._check_verifiers(set(), ["marks_its_import.below.cheks:right"])
    assert not made.exists() and "marks_its_import" not in sys.modules


def test_a_verifier_in_the_working_folder_is_found(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "from srl_rlvr.verifiers.base import graded\n\ndef right(text, reference, metadata):\n    return graded(True)\n"
    )
    (tmp_path / "own_checks.py").write_text(code)
    (tmp_path / "q.jsonl").write_text('{"question": "?", "answer": "1", "verifier": "own_checks:right"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    words = ["eval", str(tiny_model), "--data", "q.jsonl", "--engine", "transformers", "--max-tokens", "2", "--json"]
    for flags, code in (([], 2), (["--verifier", "own_checks:right"], 0)):
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, *flags])
        assert ended.value.code == code
        said = capsys.readouterr()
        if flags:
            assert json.loads(said.out)["metrics"] == {"accuracy": 1.0}
        else:
            assert "q.jsonl, row 1: " in said.err and "--verifier own_checks:right" in said.err


def test_room_on_the_disk_is_of_what_is_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, whatever the base is saved in: weights and two moments, and the reference of a KL term."""
    weights = load_file(tiny_model / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    model = 4 * sum(tensor.numel() for tensor in weights.values())

    def needed(with_best: bool = False, **settings: Any) -> float:
        free = SimpleNamespace(free=0)
        monkeypatch.setattr(session.shutil, "disk_usage", lambda place: free)
        config = configs.parse(RUN | settings, "run")
        while True:
            try:
                session._check_disk(config, tmp_path, tmp_path, with_best)
            except InputError:
                free.free += model
            else:
                return free.free / model

    assert (needed(), needed(True), needed(stages=[{"kind": "rlvr", "kl": 0.1}])) == (10, 13, 13)
    assert needed(model={"lora_rank": 4}) == 1


def test_a_models_card_shows_one_input_of_the_held_out_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    model_type = model_types.find("task_llm")
    held_out = model_type.load(tmp_path / "q.jsonl", "dev")
    tracker: Any = SimpleNamespace(
        log_metrics=lambda *_: None, log_artifacts=lambda *_: None, log_model=lambda *_: None
    )
    cards: list[dict[str, Any]] = []
    monkeypatch.setattr(session, "_save_model", lambda run, base, card: cards.append(card))
    monkeypatch.setattr(session.report, "write_report", lambda *_, **__: None)
    for table in (held_out, held_out.slice(0, 0)):
        run: Any = SimpleNamespace(
            config=configs.parse(RUN, "run"), state=State(), history=History(), out=tmp_path, held_out=table, dev=None,
            observer=SimpleNamespace(phase=lambda _: None), watch=SimpleNamespace(alarms=[]), model_type=model_type,
            without_update=lambda: [],
            rollouts=SimpleNamespace(sample=lambda *_: SimpleNamespace(steps=0, all_steps=0, rows=[])),
        )  # fmt: skip
        session._write_results(run, tmp_path, tracker)
    assert cards[0]["example"] == {"prompt": "1 + 1"} and "example" not in cards[1]
