"""The statistic that a claim of a lead stands on, and that every cell of the table is a run that can be begun."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import benchmark_module
import pytest

from srl_rlvr import config as configs

# Of stages named otherwise.
KINDS = {"guided": "srl", "steps": "srl", "own": "srl", "near": "srl", "whole": "srl", "star": "sft"}


@pytest.fixture(scope="module")
def table() -> Any:
    return benchmark_module.load("paper_table")


def scores(table: Any, solved: dict[str, float], seeds: dict[str, int] | None = None) -> dict[Any, Any]:
    """Of 64 demonstrations of sorting: so large a share of 100 problems by each sequence and seed, others by each."""
    draw = random.Random(0)
    trained = [name for name in table.TASKS["number_sorting"].sequences if table.SEQUENCES[name]]
    found = {}
    for name in trained:
        right = round(100 * solved.get(name, 0.0))
        for seed in range((seeds or {}).get(name, 3)):
            greedy = draw.sample([1] * right + [0] * (100 - right), 100)
            found[table.Cell("number_sorting", 64, name, seed)] = {"here": {"greedy": greedy}}
    return found


def lead(table: Any, found: dict[Any, Any]) -> Any:
    return table.lead(found, ["number_sorting"], 64, ["here"])


def test_a_lead_is_that_of_the_best_sequence_with_srl_over_the_best_without(table: Any) -> None:
    low, mean, high = lead(table, scores(table, {"sft": 0.3, "sft-rlvr": 0.4, "guided-srl": 0.5, "rlvr": 0.1}))
    assert mean == pytest.approx(0.1)
    assert low < 0.1 < high


def test_a_lead_that_chance_may_have_made_has_a_lower_bound_below_zero(table: Any) -> None:
    low, _, high = lead(table, scores(table, {"sft": 0.40, "guided-srl": 0.41}))
    assert low < 0 < high
    low, _, _ = lead(table, scores(table, {"sft": 0.1, "guided-srl": 0.9}))
    assert low > 0.6


def test_the_bounds_do_not_hang_on_how_the_seeds_of_two_tasks_are_numbered(table: Any) -> None:
    def found(of_seeds: dict[str, list[int]]) -> dict[Any, Any]:
        return {
            table.Cell(task, 64, name, seed): {"here": {"greedy": [int("srl" in name)] * solved + [0] * (10 - solved)}}
            for task, of_task in of_seeds.items()
            for name in table.TASKS[task].sequences
            for seed, solved in enumerate(of_task)
        }

    tasks = ["number_sorting", "thinking_sums"]
    alike, reverse = (
        table.lead(found(dict(zip(tasks, seeds, strict=True))), tasks, 64, ["here"])
        for seeds in (([2, 5, 8], [2, 5, 8]), ([2, 5, 8], [8, 5, 2]))
    )
    assert alike == pytest.approx(reverse, abs=0.03)


def test_there_is_no_lead_while_a_rival_has_not_run_every_seed(table: Any) -> None:
    solved = {"sft": 0.3, "guided-srl": 0.5}
    assert lead(table, scores(table, solved, {table.TRL: 2})) is None
    assert lead(table, scores(table, solved, {"guided-srl-rlvr": 1})) is not None  # one of ours that has not: left out


def test_a_score_counts_for_the_recipe_and_the_base_it_was_made_with(table: Any, tmp_path: Path) -> None:
    place = table.Place(tmp_path, tmp_path / "scores.jsonl")
    cell = table.Cell("number_sorting", 16, "sft", 0)
    line = {
        "cell": vars(cell),
        "recipe": table.recipe(cell, place),
        "base": table.base_digest(table.TASKS["number_sorting"].recipe.model),
    }
    newest = line | {"newest": True}

    def write(*lines: dict[str, Any]) -> None:
        place.scores.write_text("".join(json.dumps(line) + "\n" for line in lines))

    write(line, newest)
    assert table.read_scores(place) == {cell: newest}
    write(line, line | {"base": "another"})
    assert table.read_scores(place) == {cell: line}
    write(line, line | {"recipe": "another"})  # the cell was run otherwise afterwards
    assert table.read_scores(place) == {}


def test_every_cell_is_a_run_that_can_be_begun(table: Any, tmp_path: Path) -> None:
    cells = [cell for cell in table.all_cells(2) if table.sequence_of(cell)]
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        sequence = table.sequence_of(cell)
        (tmp_path / "run.toml").write_text(table.run_file(cell, table.FULL, sequence))
        config = configs.load(tmp_path / "run.toml")
        assert [stage.kind for stage in config.stages] == [KINDS.get(name, name) for name, _ in sequence], cell.name
        assert config.data[0].train == cell.demonstrations and config.seed == cell.seed
