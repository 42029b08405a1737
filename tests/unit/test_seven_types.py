"""That every cell of the table is a run that can be begun, and what its figures are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import benchmark_module
import pytest

from srl_rlvr import config as configs
from srl_rlvr.stages import sft


@pytest.fixture(scope="module")
def types() -> Any:
    return benchmark_module.load("seven_types")


def line(*scores: float) -> dict[str, Any]:
    return {"scores": list(scores), "metrics": {}, "minutes": 1.0, "peak_memory_gib": 1.0}


def test_every_cell_is_a_run_that_can_be_begun(types: Any, tmp_path: Path) -> None:
    place = types.table.Place(tmp_path, tmp_path / "scores.jsonl", held_out=8)
    for task in types.TASKS.values():
        for sequence in ("sft", types.OURS, types.HALF):
            cell = types.Cell(task.name, sequence, 0)
            (tmp_path / "run.toml").write_text(types.run_file(task, cell, place, tmp_path, tmp_path))
            config = configs.load(tmp_path / "run.toml")
            kinds = ["sft", "srl", "rlvr"]
            assert [stage.kind for stage in config.stages] == kinds[: 1 if sequence == "sft" else 3], cell.name
            assert config.data[0].dev_candidates == (task.dev_candidates or None)
            assert isinstance(first := config.stages[0], configs.SftStage)
            updates = sft.steps(first, task.training_rows(sequence))
            assert types.described(task, sequence).startswith(f"SFT ({updates})"), cell.name


def test_a_lead_is_over_rivals_that_have_run(types: Any) -> None:
    router, blood = (types.Cell(name, types.OURS, 0) for name in ("intent_router-hwu64", "multimodal_vision-bccd"))
    rival = types.Cell(router.task, "logistic", 0)
    found = {router: line(*[1.0] * 40), rival: line(*[1.0, 0.0] * 20), blood: line(1.0)}
    figures = types.report(found)
    assert figures["intent_router_score"] == 1.0 and figures["intent_router_rival"] == 0.5
    assert figures["intent_router_lead_low"] > 0.3 and len(figures) == 3
