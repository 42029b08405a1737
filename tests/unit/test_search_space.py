"""What `tune` is told to try."""

from __future__ import annotations

from pathlib import Path

import pytest

from srl_rlvr import config as configs
from srl_rlvr import search_space
from srl_rlvr.errors import InputError

RUN = '[[data]]\nfamily = "sums"\ndev = 4\n[[stages]]\nkind = "srl"\n'


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def space_file(folder: Path, text: str) -> Path:
    path = folder / "space.toml"
    path.write_text(text)
    return path


def test_a_space_is_read(run_file: Path, tmp_path: Path) -> None:
    text = """trials = 3
[keys]
"stages.srl.learning_rate" = { log_uniform = [1e-5, 1e-3] }
"stages.srl.measure" = { choice = ["characters", "words"] }
"stages.srl.group_size" = { integer = [4, 16] }
"learner.weight_decay" = { uniform = [0.0, 0.1] }
"""
    space = search_space.load(space_file(tmp_path, text), run_file)
    assert (space.trials, space.concurrent) == (3, 1)
    assert space.keys["stages.srl.group_size"].integer == [4, 16]


@pytest.mark.parametrize("value", [1e-05, 3, "words", True, [1, 2]])
def test_an_override_is_what_set_reads(run_file: Path, value: object) -> None:
    text = search_space.override("data.0.params.x", value)
    assert configs.load(run_file, [text]).data[0].params == {"x": value}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[keys]\n", "keys: dictionary should have at least 1 item"),
        (
            '[keys]\n"stages.srl.steps" = { integer = [4] }',
            "stages.srl.steps.integer: list should have at",
        ),
        ('[keys]\n"seed" = { integer = [4, 4] }', "keys.seed: integer goes from the smaller to the larger number"),
        ('[keys]\n"seed" = { integer = [4, 5], choice = [1] }', "keys.seed: give one of choice, uniform"),
        ('[keys]\n"learner.weight_decay" = { log_uniform = [0.0, 1.0] }', "log_uniform needs positive numbers"),
        ('[keys]\n"stages.srl.stepps" = { integer = [4, 5] }', "stages.srl.stepps = 4 does not fit"),
        ('[keys]\n"stages.srl.steps" = { integer = [0, 5] }', "stages.srl.steps = 0 does not fit"),
        ('[keys]\n"stages.rlvr.steps" = { integer = [1, 5] }', "there is no 'rlvr' among 1 entries"),
        ("trials = 0\n[keys]\nseed = { choice = [1] }", "trials: input should be greater than or equal to 1"),
        ("trails = 3\n[keys]\nseed = { choice = [1] }", "trails: unknown key; did you mean 'trials'?"),
        ("[keys]\nseed = { chioce = [1] }", "keys.seed.chioce: unknown key; did you mean 'choice'?"),
        ("keys = 3", "keys: must be a table of keys, not 3"),
        ("keys", "not valid TOML"),
    ],
)
def test_what_does_not_fit_is_refused(run_file: Path, tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(InputError) as caught:
        search_space.load(space_file(tmp_path, text), run_file)
    assert fault in str(caught.value)


def test_trials_need_dev_problems(run_file: Path, tmp_path: Path) -> None:
    run_file.write_text(RUN.replace("dev = 4", ""))
    with pytest.raises(InputError, match="set data.dev"):
        search_space.load(space_file(tmp_path, "[keys]\nseed = { choice = [1] }"), run_file)
    with pytest.raises(InputError, match="no such file"):
        search_space.load(tmp_path / "none.toml", run_file)
