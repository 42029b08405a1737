from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from srl_rlvr import config
from srl_rlvr.errors import InputError

DATA = '[[data]]\nfamily = "chain_sum"\n'
STAGE = '[[stages]]\nkind = "srl"\n'
RUN = DATA + STAGE
RUN_FILES = sorted((Path(__file__).parents[2] / "runs").glob("*.toml"))
TWO = DATA + '[[stages]]\nkind = "sft"\n[[stages]]\nkind = "rlvr"\nname = "polish"\n'


def load(folder: Path, text: str, *overrides: str) -> config.RunConfig:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return config.load(path, overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """The one line with which the run is refused, without the file's name."""
    with pytest.raises(InputError) as caught:
        load(folder, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder / 'run.toml'}: ")


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    run = load(tmp_path, RUN)
    assert (run.seed, run.stages[0].label, run.engine_kind) == (0, "srl", "vllm")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sed = 1\n" + RUN, "sed: unknown key; did you mean 'seed'?"),
        (RUN + "stpes = 3", "stages[0].stpes: unknown key; did you mean 'steps'?"),
        (RUN + "[engine]\nkindd = 3", "engine.kindd: unknown key; did you mean 'kind'?"),
        ('[[data]]\nfamly = "x"\n' + STAGE, "data[0].famly: unknown key; did you mean 'family'?"),
        (RUN + "[tracking]\nzzz = 3", "tracking.zzz: unknown key; known here: experiment, mlflow, rollouts_per_step"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path, text: str, expected: str) -> None:
    assert refusal(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("steps = '20'", 'stages[0].steps: input should be a valid integer, not "20"'),
        ("steps = true", "stages[0].steps: input should be a valid integer, not true"),
        ("max_tokens = 1.5", "stages[0].max_tokens: input should be a valid integer, not 1.5"),
        ("name = 3", "stages[0].name: input should be a valid string, not 3"),
        ("advantage = 'ppo'", "stages[0].advantage: input should be 'grpo', 'dr_grpo' or 'rloo', not \"ppo\""),
    ],
)
def test_a_value_of_the_wrong_type_is_shown(tmp_path: Path, line: str, expected: str) -> None:
    assert refusal(tmp_path, RUN + line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("steps = 0", "stages[0].steps: input should be greater than or equal to 1, not 0"),
        ("group_size = 1", "stages[0].group_size: input should be greater than or equal to 2, not 1"),
        ("clip_low = 1.0", "stages[0].clip_low: input should be less than 1, not 1.0"),
        ("learning_rate = nan", "stages[0].learning_rate: input should be a finite number, not NaN"),
        ("learning_rate = inf", "stages[0].learning_rate: input should be a finite number, not Infinity"),
    ],
)
def test_a_value_beyond_its_bound_is_shown_with_the_bound(tmp_path: Path, line: str, expected: str) -> None:
    assert refusal(tmp_path, RUN + line) == expected


def test_a_whole_number_stands_for_a_decimal_one(tmp_path: Path) -> None:
    assert load(tmp_path, RUN + "kl = 1").stages[0].model_dump()["kl"] == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (STAGE, "data: missing; it is required"),
        (DATA, "stages: missing; it is required"),
        ("data = []\n" + STAGE, "data: list should have at least 1 item after validation, not 0"),
        (DATA + "[[stages]]\nsteps = 3", "stages[0]: 'kind' is missing; it must be sft, dpo, srl or rlvr"),
        (DATA + '[[stages]]\nkind = "ppo"', "stages[0]: 'kind' is \"ppo\"; it must be sft, dpo, srl or rlvr"),
        ("stages = [3]\n" + DATA, "stages[0]: must be a table of keys, not 3"),
        ('[data]\nfamily = "x"\n' + STAGE, "data: must be a list of tables: write it as [[data]]"),
        ("engine = 3\n" + RUN, "engine: must be a table of keys, not 3"),
        ("[[data]]\ntrain = 3\n" + STAGE, "data[0]: give either 'path' or 'family'"),
        ('[[data]]\npath = "x"\nfamily = "y"\n' + STAGE, "data[0]: give either 'path' or 'family'"),
        ('[[data]]\npath = "x"\nparams = {a = 1}\n' + STAGE, "data[0]: 'params' go with 'family'"),
    ],
)
def test_a_wrong_structure_says_what_it_should_be(tmp_path: Path, text: str, expected: str) -> None:
    assert refusal(tmp_path, text) == expected


def test_two_stages_of_one_name_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, RUN + STAGE) == "two stages are called 'srl': give each its own 'name'"
    assert load(tmp_path, RUN + STAGE + 'name = "again"').stages[1].label == "again"


def test_a_stage_cannot_take_the_name_of_the_model_before_training(tmp_path: Path) -> None:
    assert "cannot be called 'base'" in refusal(tmp_path, RUN + 'name = "base"')


def test_an_expert_whose_thoughts_are_not_known_cannot_join_a_group(tmp_path: Path) -> None:
    expected = "stage 'srl': expert_in_group does not go with think = true"
    assert refusal(tmp_path, "think = true\n" + RUN + "expert_in_group = true") == expected


def test_own_thoughts_are_those_of_a_policy_that_thinks(tmp_path: Path) -> None:
    for kind in ("srl", "sft"):
        run = RUN.replace("srl", kind) + "own_thoughts = true"
        assert refusal(tmp_path, run) == f"stage '{kind}': own_thoughts asks for think = true"
    expected = "stage 'srl': own_thoughts asks for lines_per_action of 1 or more"
    assert refusal(tmp_path, "think = true\n" + RUN + "own_thoughts = true\nlines_per_action = 0") == expected


@pytest.mark.parametrize("content", [b"x = = 3", b"\xff\xfe", b"[data\n"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"run\.toml: not valid TOML: ."):
        config.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing.toml: no such run file"):
        config.load(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("seed=7", lambda run: run.seed == 7),
        ("name=seven", lambda run: run.name == "seven"),
        ('name="7"', lambda run: run.name == "7"),
        ("think=true", lambda run: run.think is True),
        ("engine.kind=transformers", lambda run: run.engine.kind == "transformers"),
        ("data.0.train=9", lambda run: run.data[0].train == 9),
        ("data.0.params.terms=4", lambda run: run.data[0].params == {"terms": 4}),
        ("stages.0.epochs=3", lambda run: run.stages[0].epochs == 3),
        ("stages.sft.epochs=3", lambda run: run.stages[0].epochs == 3),
        ("stages.polish.steps=3", lambda run: run.stages[1].steps == 3),
        ("stages.rlvr.steps=3", lambda run: run.stages[1].steps == 3),
    ],
)
def test_set_changes_one_key(tmp_path: Path, override: str, found: object) -> None:
    assert callable(found) and found(load(tmp_path, TWO, override))


def test_set_finds_a_stage_by_its_name_before_its_kind(tmp_path: Path) -> None:
    text = DATA + '[[stages]]\nkind = "srl"\nname = "early"\n' + STAGE
    run = load(tmp_path, text, "stages.srl.kl=0.5")
    assert [stage.model_dump()["kl"] for stage in run.stages] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "--set seed: write it as key=value, for example --set stages.srl.steps=20"),
        ("=3", "--set =3: write it as key=value, for example --set stages.srl.steps=20"),
        ("stages..steps=3", "--set stages..steps=3: write it as key=value, for example --set stages.srl.steps=20"),
        ("stages.srl.steps=3", "--set stages.srl.steps=3: there is no 'srl' among 2 entries"),
        ("stages.7.steps=3", "--set stages.7.steps=3: there is no '7' among 2 entries"),
        ("data.train=3", "--set data.train=3: 'data' holds no keys"),
        ("sed=3", "sed: unknown key; did you mean 'seed'?"),
        ("seed=x", 'seed: input should be a valid integer, not "x"'),
    ],
)
def test_set_that_fits_nowhere_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    assert refusal(tmp_path, TWO, override) == expected


def test_paths_are_relative_to_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    text = '[model]\nbase = "./models/mine"\n[[data]]\npath = "sums.jsonl"\nheld_out_path = "/abs/dev.jsonl"\n' + STAGE
    run = load(tmp_path, text)
    assert run.model.base == str(tmp_path / "models" / "mine")
    assert (run.data[0].path, run.data[0].held_out_path) == (str(tmp_path / "sums.jsonl"), "/abs/dev.jsonl")


def test_a_hub_id_stays_as_it_is(tmp_path: Path) -> None:
    assert load(tmp_path, '[model]\nbase = "org/name"\n' + RUN).model.base == "org/name"


def test_the_resolved_copy_describes_the_same_run(tmp_path: Path) -> None:
    run = load(tmp_path, TWO, "seed=7", "stages.polish.steps=3", "data.0.params.terms=4")
    assert config.parse(json.loads(config.dump(run)), "config.json") == run


def test_every_key_is_documented_by_a_sentence() -> None:
    keys = {key: sentence for key, _, sentence in config.documented_keys()}
    assert {"seed", "model.base", "data[].path", "stages[sft].learning_rate", "stages[rlvr].invalid_reward"} <= set(
        keys
    )
    assert [key for key, sentence in keys.items() if not sentence.strip().endswith((".", ";", ")"))] == []


def test_the_documented_keys_are_those_that_a_run_has(tmp_path: Path) -> None:
    stages = "".join(f'[[stages]]\nkind = "{kind}"\n' for kind in ("sft", "dpo", "srl", "rlvr"))
    tree = load(tmp_path, DATA + stages).model_dump()
    found: set[str] = set()
    for key, value in tree.items():
        if key == "stages":
            found |= {f"stages[{stage['kind']}].{name}" for stage in value for name in stage}
        elif key == "data":
            found |= {f"data[].{name}" for name in value[0]}
        elif isinstance(value, dict):
            found |= {f"{key}.{name}" for name in value}
        else:
            found.add(key)
    assert found == {key for key, _, _ in config.documented_keys()}


def test_every_declared_type_can_be_asked_for_without_torch() -> None:
    script = """
import sys
from srl_rlvr import config, model_types
for name in model_types.names():
    tree = {"model_type": name, "data": [{"path": "x"}], "stages": [{"kind": "srl"}]}
    assert model_types.find(config.parse(tree, "run").model_type).name == name
print("torch" in sys.modules)
"""
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "False"


def test_a_type_that_is_not_declared_is_named_with_the_nearest(tmp_path: Path) -> None:
    said = refusal(tmp_path, 'model_type = "rerankers"\n' + RUN)
    assert "model_type: no such type; did you mean 'reranker'?; there are embeddings, extractor" in said


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("think = true\n" + RUN, "think = true"),
        ("[model]\nlora_rank = 4\n" + RUN, "model.lora_rank"),
        (RUN + '\n[[stages]]\nkind = "dpo"\n', "dpo"),
        (RUN + '\n[[stages]]\nkind = "srl"\nname = "all"\nlines_per_action = 0\n', "lines_per_action"),
    ],
)
def test_what_is_for_text_is_refused_where_candidates_are_ranked(tmp_path: Path, text: str, what: str) -> None:
    assert f"{what} is for types that write text" in refusal(tmp_path, 'model_type = "reranker"\n' + text)


@pytest.mark.parametrize(("model_type", "picks"), [("intent_router", 1), ("reranker", 10), ("task_llm", 128)])
def test_rlvr_draws_no_more_picks_than_are_verified(tmp_path: Path, model_type: str, picks: int) -> None:
    text = f'model_type = "{model_type}"\n{DATA}[[stages]]\nkind = "rlvr"\n[evaluation]\nmax_tokens = 128\n'
    found = load(tmp_path, text)
    assert found.stages[0].kind == "rlvr" and found.stages[0].max_tokens == picks == found.evaluation.max_tokens


def test_an_order_of_candidates_is_a_rerankers_and_of_all_its_data(tmp_path: Path) -> None:
    ordered = RUN.replace("[[data]]", "[[data]]\nordered = true")
    assert "data.ordered is for a reranker, not for a task_llm" in refusal(tmp_path, ordered)
    both = 'model_type = "reranker"\n' + ordered + '\n[[data]]\npath = "other.jsonl"\n'
    assert "data.ordered should be the same for all data" in refusal(tmp_path, both)
    mined = 'model_type = "reranker"\n' + ordered + "\nhardest = 3\n"
    assert "'hardest' does not go with data.ordered" in refusal(tmp_path, mined)


def test_what_is_trained_is_multiplied_in_float32(tmp_path: Path) -> None:
    said = refusal(tmp_path, '[model]\nmatmul = "bfloat16"\n' + RUN)
    assert "model.matmul = 'bfloat16' is for weights that are not trained: set model.lora_rank" in said


def test_keys_that_are_one_of_some_say_which() -> None:
    defaults = {key: default for key, default, _ in config.documented_keys()}
    assert defaults["stages[srl].measure"] == '"characters"  # or "words", "tokens", "lcs"'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DATA + STAGE + "[evaluation]\npatience = 2\n", "there are none: set data.dev"),
        (DATA + 'held_out_path = "x.jsonl"\n' + STAGE, "'held_out_path' goes with 'path'"),
        (DATA + "dev_candidates = 5\n" + STAGE, "set 'dev'"),
        (DATA + STAGE + 'name = "n"\n', "cannot be called 'n'"),
        ('name = ""\n' + DATA + STAGE, "name"),
    ],
)
def test_what_could_only_be_ignored_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(tmp_path, text)


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: file.stem)
def test_the_run_files_are_right(file: Path) -> None:
    read = config.load(file)
    assert read.data[0].dev and [stage.kind for stage in read.stages] == ["sft", "srl", "rlvr"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RUN + "[learner]\nstrategy = 'fsdp'", ("learner.strategy", "learner.workers")),
        ("model_type = 'reranker'\n" + RUN + "[learner]\nstrategy = 'fsdp'\nworkers = 2", ("strategy", "reranker")),
        ("model_type = 'multimodal_vision'\n" + RUN + "[engine]\nkind = 'vllm'", ("engine.kind", "transformers")),
        (RUN + "max_tokens = 2000\n[model]\nmax_context = 64", ("'srl'", "2000", "model.max_context", "64")),
        ("seed = 9223372036854775808\n" + RUN, ("seed", "9223372036854775808")),
        (RUN + "[learner]\nbetas = [0.9]", ("learner.betas",)),
        (RUN + "[learner]\nbetas = [0.9, 1.0]", ("learner.betas",)),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_key(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    said = refusal(tmp_path, text)
    assert all(word in said for word in words)


def test_an_action_of_a_type_that_ranks_is_one_pick(tmp_path: Path) -> None:
    """dr_grpo divides by the longest action."""
    run = load(tmp_path, "model_type = 'embeddings'\n" + RUN + "advantage = 'dr_grpo'")
    assert run.stages[0].model_dump()["max_tokens"] == 1


@pytest.mark.parametrize(("model_type", "engine"), [("task_llm", "vllm"), ("embeddings", "ranking")])
def test_the_engine_is_the_one_that_the_type_needs(tmp_path: Path, model_type: str, engine: str) -> None:
    run = load(tmp_path, f"model_type = '{model_type}'\n" + RUN)
    assert run.engine_kind == engine
    assert config.parse(json.loads(config.dump(run)), "config.json").engine_kind == engine


def test_own_verifiers_are_functions_of_modules(tmp_path: Path) -> None:
    assert load(tmp_path, 'verifiers = ["checks:right", "a.b:c"]\n' + RUN).verifiers == ["checks:right", "a.b:c"]
    for wrong in ("checks", "checks:", ":right", "os:system('x')", "a..b:c"):
        assert "package.module:function" in refusal(tmp_path, f'verifiers = ["{wrong}"]\n' + RUN)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        ".",
        "..",
        "../beside",
        "/absolute",
        "team/try",
        "a\\b",
        "x\ny",
        "x\r",
        "x\u2028y",
        "\0",
        "n" * 201,
        "ä" * 101,
    ],
)
def test_a_name_that_leaves_its_folder_or_its_line_is_refused_in_one_line(name: str) -> None:
    data = [{"family": "sums"}]
    trees = [{"name": name, "data": data, "stages": [{"kind": "rlvr"}]}]
    if name:  # a stage without a name is called by its kind
        trees.append({"data": data, "stages": [{"kind": "rlvr", "name": name}]})
    for tree in trees:
        with pytest.raises(InputError, match="name: .*should have|name: should") as caught:
            config.parse(tree, "run")
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["läuf 😀 1", "実行", "تجربة", "می‌خواهم", ".hidden", 'it\'s "so"', "a%20b?x=1#y", "-x", "n" * 200]
)
def test_names_of_any_script_stay_allowed(name: str) -> None:
    tree = {"name": name, "data": [{"family": "sums"}], "stages": [{"kind": "rlvr", "name": name}]}
    assert config.parse(tree, "run").name == name
