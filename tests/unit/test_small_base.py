"""What the small base learns from, and the model that comes of it; whether it learns is a matter of benchmarks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from srl_rlvr import small_base
from srl_rlvr.errors import InputError
from srl_rlvr.examples import families, generated
from srl_rlvr.model_types import task_llm
from srl_rlvr.policies import base_models


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    families = small_base.FAMILIES.items()
    return [row for name, params in families for row in generated.generate(name, 60, 7, params).to_pylist()]


@pytest.fixture(scope="module")
def tokenizer(problems: list[dict[str, Any]]) -> Any:
    return small_base.train_tokenizer(problems)


@pytest.fixture
def texts(problems: list[dict[str, Any]], tokenizer: Any) -> small_base.Texts:
    by_family = [[row for row in problems if row["task"] == name] for name in small_base.FAMILIES]
    return small_base.Texts(by_family, tokenizer, seed=0)


def test_digits_and_line_breaks_are_tokens_of_their_own(tokenizer: Any) -> None:
    text = "451 - 82.5 = -37\nAnswer: ['1', '22']\n"
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    assert "".join(tokens) == text
    assert [token for token in tokens if any(c.isdigit() or c == "\n" for c in token)] == [
        c for c in text if c.isdigit() or c == "\n"
    ]


# What a batch of 64 texts is made of, once the openings are no longer alone.
OPENINGS, MOVES, REWRITINGS, ECHOES = slice(0, 16), slice(16, 40), slice(40, 56), slice(56, 60)


def test_no_text_predicts_more_than_one_line_of_one_solution(
    problems: list[dict[str, Any]], tokenizer: Any, texts: small_base.Texts
) -> None:
    owners: dict[str, set[str]] = {}
    for row in problems:
        for line in (*row["steps"], f"Answer: {row['reference']}"):
            owners.setdefault(line, set()).add(row["id"])
    pairs = 0
    for _ in range(10):
        batch = texts.batch(64, progress=0.9)
        del batch[ECHOES]
        for _, predicted in batch:
            lines = tokenizer.decode(predicted).removesuffix(small_base.END).strip().split("\n")
            for one, other in itertools.combinations([owners[line] for line in lines], 2):
                pairs += 1
                assert len(one | other) > 1
    assert pairs > 200


def test_an_opening_is_a_problem_and_the_first_step_that_is_predicted(
    problems: list[dict[str, Any]], tokenizer: Any, texts: small_base.Texts
) -> None:
    prompts = [task_llm.TYPE.encode_prompt(tokenizer, row, think=False) for row in problems]
    for given, predicted in texts.batch(64, progress=0.9)[OPENINGS]:
        assert tokenizer.decode(predicted) == f"{problems[prompts.index(given)]['steps'][0]}\n"


def test_a_move_is_a_problem_with_one_line_and_the_next_line_is_predicted(
    problems: list[dict[str, Any]], tokenizer: Any, texts: small_base.Texts
) -> None:
    prompts = [(task_llm.TYPE.encode_prompt(tokenizer, row, think=False), row["steps"]) for row in problems]
    for given, predicted in texts.batch(64, progress=0.9)[MOVES]:
        end, steps = next((len(prompt), steps) for prompt, steps in prompts if given[: len(prompt)] == prompt)
        pairs = [(f"{one}\n", f"{next_one}\n") for one, next_one in itertools.pairwise(steps)]
        assert (tokenizer.decode(given[end:]), tokenizer.decode(predicted)) in pairs


def test_a_rewriting_gathers_lines_without_their_problem(
    problems: list[dict[str, Any]], tokenizer: Any, texts: small_base.Texts
) -> None:
    gathered = {}
    for row in problems:
        *lines, last = [f"{step}\n" for step in row["steps"]]
        gathered["".join(lines)] = last
        gathered[last] = f"Answer: {row['reference']}{small_base.END}"
    for given, predicted in texts.batch(64, progress=0.9)[REWRITINGS]:
        assert given[0] == tokenizer.eos_token_id
        assert gathered[tokenizer.decode(given[1:])] == tokenizer.decode(predicted)


def test_an_echo_is_a_piece_of_its_own_problem(tokenizer: Any, texts: small_base.Texts) -> None:
    for given, predicted in texts.batch(64, progress=0.9)[ECHOES]:
        problem, _, piece = tokenizer.decode(given).rpartition("<|im_end|>\n<|im_start|>assistant\n")
        assert piece + tokenizer.decode(predicted) in problem
        assert piece and predicted


def test_short_problems_come_first_and_only_openings_at_first(tokenizer: Any, texts: small_base.Texts) -> None:
    first, late = texts.batch(64, progress=0.0), texts.batch(64, progress=0.9)
    assert max(len(given) for given, _ in first) < max(len(given) for given, _ in late[OPENINGS])
    assert [sum(given[0] == tokenizer.eos_token_id for given, _ in batch) for batch in (first, late)] == [0, 20]


def test_the_same_seed_builds_the_same_model(tmp_path: Path) -> None:
    seen: list[float] = []
    for name in ("a", "b"):
        small_base.build(
            tmp_path / name, families={"sums": {}}, seed=3, updates=2, texts_per_update=8, problems=40,
            observe=lambda update, metrics: seen.append(metrics["loss"]),
        )  # fmt: skip
    assert seen[:2] == seen[2:]
    first, second = (base_models.load_model(tmp_path / name) for name in ("a", "b"))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert 3e6 < sum(p.numel() for p in first.parameters()) < 5e6
    card = json.loads((tmp_path / "a" / "model_card.json").read_text())
    assert card["families"] == {"sums": {}} and card["updates"] == 2
    assert base_models.load_tokenizer(tmp_path / "a").eos_token == small_base.END
    assert not list(tmp_path.glob(".*"))


def test_an_unknown_family_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="family 'summs' is not known; did you mean 'sums'"):
        small_base.build(tmp_path / "a", families={"summs": {}}, updates=1)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def sums() -> list[dict[str, Any]]:
    return generated.generate("basic_arithmetic", 60, 7, small_base.THINKING_FAMILIES["basic_arithmetic"]).to_pylist()


def test_a_base_that_thinks_predicts_thoughts_with_their_lines(sums: list[dict[str, Any]]) -> None:
    tokenizer = small_base.train_tokenizer(sums, think=True)
    batch = small_base.Texts([sums], tokenizer, seed=0, think=True).batch(64, progress=0.9)
    of_prompt = {tokenizer.decode(task_llm.TYPE.encode_prompt(tokenizer, row, think=True)): row for row in sums}
    kinds = {"thought given": 0, "line given": 0}
    for given, predicted in [*batch[:48], *batch[48:56]]:  # openings and moves, rewritings
        prompt, mark, before = tokenizer.decode(given).partition("<|im_start|>assistant\n")
        row = of_prompt[prompt + mark]
        lines = [*(f"{step}\n" for step in row["steps"]), f"Answer: {row['reference']}{small_base.END}"]
        thought, _, line = tokenizer.decode(predicted).removeprefix("<think>").partition("</think>")
        k = lines.index(before.rpartition("</think>")[2]) + 1 if before else 0
        assert line == lines[k]
        assert thought == ("" if line == lines[-1] else families.column_addition(line))
        if before:
            kinds["thought given" if "<think>" in before else "line given"] += 1
    assert min(kinds.values()) > 8


def test_a_family_without_thoughts_is_refused_by_a_base_that_thinks(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="family 'sums' has no thoughts, which think asks for; "
        "basic_arithmetic, rewritten_sums, leg_counting have",
    ):
        small_base.build(tmp_path / "a", families={"sums": {}}, think=True, updates=1)
    with pytest.raises(InputError, match="family 'summs' is not known"):
        small_base.build(tmp_path / "a", families={"summs": {}}, think=True, updates=1)
    assert not list(tmp_path.iterdir())
