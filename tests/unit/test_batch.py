"""Groups of samples: which become what an update learns from, with what advantage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from unit.scripted import ScriptedCrew, problems, varied

from srl_rlvr import config as configs
from srl_rlvr import pipeline, records
from srl_rlvr.batch import Batch
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import RunError
from srl_rlvr.policies import base_models


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return base_models.load_tokenizer(tiny_model)


def group(rewards: list[tuple[str, float]], expert: list[int] | None = None, **stage: Any) -> Batch:
    of_expert = {"p": expert} if expert else {}
    batch = Batch(configs.RlvrStage(kind="rlvr", group_size=len(rewards), **stage), version=0, experts=of_expert)
    prompt = records.build(
        "Prompt",
        [
            {
                "id": "p", "example_id": "p", "stage": "rlvr", "step_index": -1, "token_ids": [5, 6], "trunk_id": "p",
                "offset": 2, "verifier": "number", "reference": "1", "metadata": "{}",
            }
        ],
    )  # fmt: skip
    crew = ScriptedCrew(lambda _, index, __: rewards[index])
    batch.add(prompt, *crew.sample(prompt, SamplingSpec(len(rewards), 1.0, 4)))
    return batch


def advantages(batch: Batch) -> dict[int, float]:
    return {row["sample_index"]: row["advantage"] for row in batch.samples.to_pylist()}


def test_failed_verdicts_leave_the_group_mean_alone() -> None:
    batch = group([("scored", 1.0), ("failed", -7.0), ("scored", 0.0), ("invalid", -1.0)], advantage="dr_grpo")
    assert advantages(batch) == pytest.approx({0: 1.0, 2: 0.0, 3: -1.0})
    assert batch.metrics["reward"] == pytest.approx(0.0) and batch.metrics["pass_rate"] == pytest.approx(1 / 3)
    assert [batch.metrics[name] for name in records.OUTCOMES] == [2.0, 1.0, 1.0]


def test_each_sample_has_the_advantage_of_its_own_reward() -> None:
    batch = group([("scored", r) for r in (0.5, 0.0, 1.0, 0.25)], advantage="dr_grpo")
    assert advantages(batch) == pytest.approx({0: 0.0625, 1: -0.4375, 2: 0.5625, 3: -0.1875})
    for row in batch.samples.to_pylist():
        assert row["completion_ids"] == [5 + row["sample_index"], 0]
        assert batch.advantage_of["p", row["sample_index"]] == pytest.approx(row["advantage"])


@pytest.mark.parametrize(
    "rewards",
    [
        [("scored", 1.0)] * 3,
        [("scored", 1.0), ("failed", 0.0), ("failed", 0.0)],
        [("failed", 0.0)] * 3,
        [("scored", 0.5), ("scored", 0.5005), ("failed", 0.0)],
    ],
    ids=["constant", "one judged", "none judged", "below the deviation asked for"],
)
def test_a_group_without_signal_teaches_nothing_and_is_counted(rewards: list[tuple[str, float]]) -> None:
    batch = group(rewards)
    assert batch.samples.num_rows == 0 and batch.with_signal == 0
    assert batch.metrics["groups_drawn"] == 1.0 and batch.metrics["groups_with_signal"] == 0.0
    assert sum(batch.metrics[name] for name in records.OUTCOMES) == 3.0


def test_the_expert_joins_a_group_and_is_none_of_its_samples() -> None:
    batch = group([("scored", 0.5), ("failed", 0.0), ("scored", 0.5)], expert=[7, 8, 0], advantage="dr_grpo")
    assert advantages(batch) == pytest.approx({0: -1 / 6, 2: -1 / 6, 3: 1 / 3})
    [expert] = [row for row in batch.samples.to_pylist() if row["sample_index"] == 3]
    assert (expert["prompt_ids"], expert["completion_ids"]) == ([5, 6], [7, 8, 0])
    assert np.isnan(expert["behavior_logprobs"]).all()
    assert batch.metrics["reward"] == 0.5 and batch.metrics["groups_with_signal"] == 1.0


def test_a_group_that_is_right_throughout_is_not_taught_the_expert_again() -> None:
    assert group([("scored", 1.0)] * 3, expert=[7, 8, 0]).samples.num_rows == 0


def add(batch: Batch, prompts: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> None:
    batch.add(prompts, rollouts, verdicts, {"sample_s": 0.0, "verify_s": 0.0})


@pytest.fixture
def answered(tokenizer: Any) -> tuple[Batch, pa.Table, pa.Table, pa.Table]:
    prompts = pipeline.rlvr.prompts(problems(2), tokenizer, "rlvr", False)
    rollouts, verdicts, _ = ScriptedCrew(varied).sample(prompts, SamplingSpec(2, 1.0, 4))
    return Batch(configs.RlvrStage(kind="rlvr", group_size=2), version=0), prompts, rollouts, verdicts


def test_rollouts_of_another_prompt_are_refused(answered: tuple[Batch, pa.Table, pa.Table, pa.Table]) -> None:
    batch, prompts, rollouts, verdicts = answered
    backwards = pa.array([2, 3, 0, 1])
    for tables in ((rollouts.take(backwards), verdicts), (rollouts, verdicts.take(backwards))):
        with pytest.raises(RunError, match=r"^(rollout|verdict) 0 of \w+ stands where 0 of \w+ should$"):
            add(batch, prompts, *tables)


def test_a_missing_rollout_or_verdict_is_refused(answered: tuple[Batch, pa.Table, pa.Table, pa.Table]) -> None:
    batch, prompts, rollouts, verdicts = answered
    with pytest.raises(RunError, match="^2 prompts × 2: got 4 rollouts and 3 verdicts$"):
        add(batch, prompts, rollouts, verdicts.slice(1))
    with pytest.raises(RunError, match="^2 prompts × 2: got 3 rollouts and 4 verdicts$"):
        add(batch, prompts, rollouts.slice(1), verdicts)


def test_samples_of_a_group_in_another_order_are_refused(
    answered: tuple[Batch, pa.Table, pa.Table, pa.Table],
) -> None:
    batch, prompts, rollouts, verdicts = answered
    with pytest.raises(RunError, match=r"^verdict 1 of (\w+) stands where 0 of \1 should$"):
        add(batch, prompts, rollouts, verdicts.take(pa.array([1, 0, 2, 3])))


@pytest.mark.parametrize(("learner", "max_staleness"), [(1, 0), (-1, 0), (3, 2), (-1, 2)])
def test_a_rollout_that_is_too_old_or_of_a_later_policy_is_refused(
    answered: tuple[Batch, pa.Table, pa.Table, pa.Table], learner: int, max_staleness: int
) -> None:
    batch, prompts, rollouts, verdicts = answered
    batch.version, batch.max_staleness = learner, max_staleness
    with pytest.raises(
        RunError,
        match=f"is of policy version 0, the learner's is {learner}, and max_staleness is {max_staleness}$",
    ):
        add(batch, prompts, rollouts, verdicts)


def test_staleness_is_the_mean_age_of_the_rollouts(answered: tuple[Batch, pa.Table, pa.Table, pa.Table]) -> None:
    batch, prompts, rollouts, verdicts = answered
    batch.version = batch.max_staleness = 2
    versions = pa.array([0, 1, 2, 2])
    add(batch, prompts, rollouts.set_column(2, rollouts.schema.field(2), versions), verdicts)
    assert batch.metrics["staleness"] == 0.75
    assert batch.samples["policy_version"].to_pylist() == versions.to_pylist()


def test_metrics_tell_what_well_formed_answers_earned_and_how_many_were_cut_off() -> None:
    batch = group([("scored", 1.0), ("scored", 0.5), ("invalid", -1.0), ("failed", 0.0)])
    assert batch.metrics["scored_reward"] == 0.75 and batch.metrics["truncated"] == 0.0
