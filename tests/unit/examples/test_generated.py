import json
import re
import subprocess
import sys
from typing import Any

import pytest
import reasoning_gym

from srl_rlvr import records
from srl_rlvr.errors import InputError
from srl_rlvr.examples.families import FAMILIES, column_addition, leg_total
from srl_rlvr.examples.generated import generate, generate_split

RUNS_ANSWERS_AS_CODE = {
    *("binary_matrix", "n_queens", "spiral_matrix", "string_insertion", "countdown", "puzzle24"),
    *("polynomial_multiplication", "simple_integration", "intermediate_integration"),
}
WIDER = {
    "sums": {"min_terms": 2, "max_terms": 9, "max_digits": 6, "allow_negation": True},
    "basic_arithmetic": {"max_terms": 8, "operators": ["+", "-", "*", "/"], "format_style": "natural"},
    "products": {"min_terms": 2, "max_terms": 4, "max_digits": 9, "allow_negation": True},
    "gcd": {"max_numbers": 5},
    "lcm": {"max_numbers": 5},
    "fraction_simplification": {"styles": ["latex_frac", "plain"]},
    "prime_factorization": {"max_value": 100_000},
    "base_conversion": {"max_base": 36, "min_value": 0, "max_value": 50},
    "simple_equations": {"max_terms": 7},
    "number_filtering": {"max_numbers": 12, "max_decimals": 4},
    "word_sorting": {"max_words": 12, "transformation": "randomcase"},
}
CASES = [*((name, {}) for name in FAMILIES), *WIDER.items()]


def expert_answers(family: str, last_step: str) -> list[str]:
    """What the last step concludes; of gsm_symbolic's sentences, any number of the last one."""
    if family == "gsm_symbolic":
        return [number.replace(",", "") for number in re.findall(r"\d[\d,]*(?:\.\d+)?", last_step)]
    return [re.split(r"= |: ", last_step)[-1]]


@pytest.mark.parametrize(("family", "params"), CASES, ids=[f"{n}{'-wider' if p else ''}" for n, p in CASES])
def test_every_expert_earns_full_score_from_reasoning_gyms_own_scorer(family: str, params: dict[str, Any]):
    scorer = reasoning_gym.create_dataset(FAMILIES[family].dataset, seed=0, size=1)
    for row in generate(family, 200, seed=11, params=params).to_pylist():
        entry = json.loads(row["metadata"])["entry"]
        assert scorer.score_answer(row["reference"], entry) >= 1.0
        answers = expert_answers(family, row["steps"][-1])
        assert any(scorer.score_answer(answer, entry) >= 1.0 for answer in answers), (row["prompt"], row["steps"])


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_single_lines_without_the_final_answer_line(family: str):
    for row in generate(family, 50, seed=2).to_pylist():
        assert row["steps"]
        assert row["difficulty"] == len(row["steps"])
        for step in row["steps"]:
            assert step == step.strip() and "\n" not in step and step
            assert not step.startswith("Answer")


def test_at_least_twelve_families_and_none_whose_scorer_runs_the_answer_as_code():
    assert len(FAMILIES) >= 12
    assert not RUNS_ANSWERS_AS_CODE & {family.dataset for family in FAMILIES.values()}


def test_metadata_and_provenance_suffice_to_draw_the_item_again():
    row = generate("gcd", 3, seed=5).to_pylist()[2]
    metadata, drawn = json.loads(row["metadata"]), json.loads(row["provenance"])
    assert drawn["source"] == "reasoning-gym" and drawn["family"] == "gcd" and drawn["version"]
    again = reasoning_gym.create_dataset(metadata["dataset"], seed=drawn["dataset_seed"], **drawn["params"])
    assert again[drawn["index"]]["question"] == metadata["entry"]["question"]


def test_the_same_seed_gives_the_same_table_and_a_longer_one_begins_with_it():
    short, long = generate("sums", 20, seed=1), generate("sums", 30, seed=1)
    assert short.equals(long.slice(0, 20).combine_chunks())
    records.check("Example", short)


def test_neighboring_seeds_share_hardly_anything():
    first, second = (set(generate("sums", 200, seed=seed)["id"].to_pylist()) for seed in (1, 2))
    assert len(first & second) < 5


def test_held_out_and_train_never_meet_and_held_out_stays_when_train_grows():
    small = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    train, _, held_out = generate_split("sums", train=100, held_out=60, seed=3, params=small)
    more, _, same = generate_split("sums", train=130, held_out=60, seed=3, params=small)
    assert (train.num_rows, more.num_rows, held_out.num_rows) == (100, 130, 60)
    assert not set(held_out["id"].to_pylist()) & set(more["id"].to_pylist())
    assert held_out.equals(same)
    assert train.equals(more.slice(0, 100).combine_chunks())


def test_one_problem_in_two_wordings_has_one_id():
    rows = generate("simple_equations", 100, seed=0).to_pylist()
    assert {row["prompt"].split()[0] for row in rows} == {"Solve"}


def test_params_pass_through():
    rows = generate("sums", 5, params={"min_terms": 7, "max_terms": 7, "max_digits": 1}).to_pylist()
    assert all(len(row["steps"]) == 6 for row in rows)


@pytest.mark.parametrize(
    ("family", "params", "says"),
    [
        ("sum", {}, "family 'sum' is not known; did you mean 'sums'?"),
        ("sums", {"max_term": 3}, "family 'sums' has no param 'max_term'; did you mean 'max_terms'?"),
        ("sums", {"seed": 3}, "family 'sums' has no param 'seed'"),
        ("sums", {"max_terms": "many"}, "family 'sums', param 'max_terms' is 'many'; it should be a whole number"),
        ("sums", {"max_terms": 2}, "max_terms must be >= min_terms"),
        (
            "word_sorting",
            {"transformation": "upper"},
            "param 'transformation' is 'upper'; it should be one of lowercase",
        ),
        ("fraction_simplification", {"styles": ["roman"]}, "styles"),
        ("count_bits", {"min_n": 1, "max_n": 4}, "gave 4 distinct examples in 1200 tries, 10 were asked for"),
    ],
)
def test_what_cannot_be_generated_is_said_in_one_line(family: str, params: dict[str, Any], says: str):
    with pytest.raises(InputError) as raised:
        generate(family, 10, params=params)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_generating_imports_neither_ray_nor_torch():
    code = (
        "import sys; from srl_rlvr.examples import files, generated; generated.generate('sums', 2);"
        "sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("step", "thought"),
    [
        ("7 + 8 = 15", "7 + 8 = 15"),
        ("97 + 8 = 105", "7 + 8 = 15, 9 + 0 + 1 = 10"),
        ("105 + 21 = 126", "5 + 1 = 6, 0 + 2 = 2, 1 + 0 = 1"),
        ("9 * 8 = 72", ""),
        ("-4 + 2 = -2", ""),
        ("Answer: 7", ""),
    ],
)
def test_a_sum_is_worked_out_digit_by_digit(step: str, thought: str):
    assert column_addition(step) == thought


@pytest.mark.parametrize(
    ("step", "thought"),
    [
        ("lion: 1 * 4 = 4, total = 4", "1 * 4 = 4"),
        ("praying mantis: 9 * 6 = 54, total = 112", "9 * 6 = 54, 8 + 4 = 12, 5 + 5 + 1 = 11"),
        ("leech: 5 * 0 = 0, total = 16", "5 * 0 = 0, 6 + 0 = 6, 1 + 0 = 1"),
        ("Answer: 7", ""),
    ],
)
def test_legs_are_added_to_the_total_digit_by_digit(step: str, thought: str):
    assert leg_total(step) == thought


def test_every_step_of_a_leg_count_has_a_thought():
    for row in generate("leg_counting", 50, 3).to_pylist():
        assert all(map(leg_total, row["steps"]))


def test_a_rewritten_sum_begins_with_what_the_step_before_left():
    for row in generate("rewritten_sums", 50, 3, {"min_terms": 4, "max_terms": 6}).to_pylist():
        left = row["prompt"].removeprefix("Calculate ").removesuffix(".")
        for step in row["steps"]:
            done, _, then = step.partition(", left: ")
            pair, total = done.split(" = ")
            assert sum(map(int, pair.split(" + "))) == int(total)
            assert left.startswith(pair) and left.replace(pair, total, 1) == (then or total)
            assert column_addition(step) == column_addition(done) != ""
            left = then
        assert total == row["reference"]


def test_a_sum_that_holds_more_than_additions_is_not_rewritten():
    rows = generate("rewritten_sums", 20, 3, {"operators": ["+", "-"], "min_terms": 3}).to_pylist()
    assert len(rows) == 20 and not any("-" in row["prompt"] for row in rows)


def test_the_thoughts_of_a_sum_spell_its_total():
    for row in generate("basic_arithmetic", 50, 3, {"operators": ["+"], "max_digits": 3}).to_pylist():
        for step in row["steps"]:
            if thought := column_addition(step):
                columns = [column.rpartition(" = ")[2] for column in thought.split(", ")]
                digits = [columns[-1], *(column[-1] for column in reversed(columns[:-1]))]
                assert "".join(digits).lstrip("0").zfill(1) == step.rpartition(" = ")[2]
