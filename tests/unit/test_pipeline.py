"""Scheduling: who is asked what, in which order, and what is kept. The crew is a scripted stand-in, so nothing here
says anything about learning."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from unit.scripted import Notes, Script, ScriptedCrew, mixed, problems, varied

from srl_rlvr import checkpoints, pipeline, records
from srl_rlvr import config as configs
from srl_rlvr.checkpoints import History, State
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import InputError, RunError, Stopped
from srl_rlvr.examples.curriculum import Order
from srl_rlvr.pipeline import Run
from srl_rlvr.policies import base_models
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.stages import sft, srl


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return base_models.load_tokenizer(tiny_model)


def make_run(tokenizer: Any, out: Path, script: Script, *stages: dict[str, Any], **settings: Any) -> Run:
    tree = {"data": [{"family": "chain_sum"}], "stages": list(stages), "checkpoint_every": 2} | settings
    held_out = problems(3, first=100)
    crew = ScriptedCrew(script)
    return Run(
        configs.parse(tree, "test"), problems(6), held_out, tokenizer, crew, out, Notes(), State(), History()
    )  # fmt: skip


def from_checkpoint(run: Run) -> None:
    """The newest of its folder, of another life."""
    folder = checkpoints.latest(run.out)
    assert folder is not None
    run.state, run.history = checkpoints.read(folder)
    run.crew.load(folder)
    run.crew.hand_over()


def asked(run: Run, what: str) -> list[Any]:
    assert isinstance(run.crew, ScriptedCrew)
    return [entry for entry in run.crew.log if entry[0] == what]


def drawn(run: Run) -> list[str]:
    return [i for _, stage, ids, _ in asked(run, "sample") if stage != "evaluation" for i in ids]


def notes(run: Run) -> list[str]:
    assert isinstance(run.observer, Notes)
    return run.observer.notes


RLVR = {"kind": "rlvr", "steps": 3, "prompts_per_step": 2, "group_size": 4, "max_refills": 2}
SRL = {"kind": "srl", "steps": 5, "prompts_per_step": 3, "group_size": 3, "max_refills": 1, "kl": 0.1}
SFT = {"kind": "sft", "epochs": 2, "batch_size": 4}


# Steps


def test_constant_groups_are_left_out_and_the_batch_is_refilled(tokenizer: Any, tmp_path: Path) -> None:
    constant: list[str] = []

    def script(prompt_id: str, index: int, seed: int) -> tuple[str, float]:
        if len(constant) < 1:
            constant.append(prompt_id)
        return ("scored", 0.0) if prompt_id in constant else varied(prompt_id, index, seed)

    run = make_run(tokenizer, tmp_path, script, RLVR | {"steps": 1})
    run.state.held_out["base"] = [0.0, 0.0, 1.0]
    run.execute()
    batches = [ids for _, stage, ids, _ in asked(run, "sample") if stage == "rlvr"]
    assert [len(ids) for ids in batches] == [2, 1] and constant[0] in batches[0]
    (update,) = asked(run, "update")
    taught = {row["prompt_id"] for row in update[1]}
    assert taught == {i for ids in batches for i in ids} - set(constant) and len(taught) == 2
    assert run.history.metrics[0]["groups_drawn"] == 3.0 and run.history.metrics[0]["groups_with_signal"] == 2.0


def test_refills_are_bounded_and_a_step_without_signal_updates_nothing(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, lambda *_: ("scored", 0.0), RLVR | {"steps": 2})
    run.execute()
    assert len([entry for entry in asked(run, "sample") if entry[1] == "rlvr"]) == 2 * (1 + 2)
    assert asked(run, "update") == [] and run.state.version == 0
    assert any("step 1: every group earned one reward alike; no update" in note for note in notes(run))
    assert len(run.history.metrics) == 2


def test_what_goes_wrong_is_said_in_the_step_where_it_shows(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = ScriptedCrew.update
    monkeypatch.setattr(ScriptedCrew, "update", lambda *given: update(*given) | {"divergence": 0.3})
    run = make_run(tokenizer, tmp_path, varied, RLVR)
    run.execute()
    (warning,) = [note for note in notes(run) if note.startswith("WARNING")]
    assert warning.startswith("WARNING: rlvr, step 1: engine and learner diverge: KL(engine || learner) is 0.300")


def test_the_experts_step_joins_each_group_of_its_own_prompt(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, varied, SRL | {"expert_in_group": True})
    run.execute()
    prompts = srl.prompts(run.train, tokenizer, configs.SrlStage.model_validate(SRL), think=False)
    steps = {row["id"]: row["reference"] for row in prompts.to_pylist()}
    for _, samples, _ in asked(run, "update"):
        experts = [row for row in samples if row["sample_index"] == SRL["group_size"]]
        assert len(experts) == len({row["prompt_id"] for row in samples}) == SRL["prompts_per_step"]
        for row in experts:
            text = tokenizer.decode([token for token in row["completion_ids"] if token != tokenizer.eos_token_id])
            assert text == steps[row["prompt_id"]]


@pytest.mark.parametrize("script", [varied, mixed], ids=["without refills", "with refills"])
def test_prompts_are_drawn_one_after_the_other_and_none_is_skipped(
    tokenizer: Any, tmp_path: Path, script: Script
) -> None:
    run = make_run(tokenizer, tmp_path, script, RLVR | {"steps": 7})
    run.execute()
    ids, order = run.train["id"].to_pylist(), Order(run.train["id"].to_pylist(), 0, "rlvr")
    asked_for = drawn(run)
    assert asked_for == [ids[row] for cursor in range(len(asked_for)) for row in order.take(cursor, 1)]
    assert len(asked_for) >= 14 and sorted(asked_for[:6]) == sorted(asked_for[6:12]) == sorted(ids)


def test_every_batch_is_sampled_with_a_seed_of_its_own(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, mixed, SRL, RLVR)
    run.execute()
    seeds = [spec.seed for _, stage, _, spec in asked(run, "sample") if stage != "evaluation"]
    assert len(set(seeds)) == len(seeds) > 8


def test_all_stages_run_in_order_with_an_evaluation_after_each(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, varied, SFT, SRL, RLVR)
    run.execute()
    assert list(run.state.held_out) == ["base", "sft", "srl", "rlvr"]
    assert [entry[1] for entry in asked(run, "begin_stage")] == [False, True, False]
    assert [row["stage"] for row in run.history.metrics] == ["sft"] * 3 + ["srl"] * 5 + ["rlvr"] * 3
    assert run.state.version == 11 and run.state.stage == 3
    evaluated = [spec for _, stage, _, spec in asked(run, "sample") if stage == "evaluation"]
    assert [(spec.samples, spec.temperature) for spec in evaluated] == [(1, 0.0)] * 4


def test_stages_in_between_are_not_evaluated_where_it_was_not_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, varied, SFT, SRL, RLVR, evaluation={"on_stages": False})
    run.execute()
    assert list(run.state.held_out) == ["base", "rlvr"]


def test_the_warm_up_sees_each_solution_once_an_epoch(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, varied, SFT | {"examples": 5, "epochs": 3, "batch_size": 2})
    run.execute()
    seen = [row["prompt_id"] for _, rows, _ in asked(run, "update") for row in rows]
    wanted = run.train["id"].to_pylist()[:5]
    assert all(seen[5 * epoch : 5 * epoch + 5] != wanted for epoch in range(3))
    assert all(sorted(seen[5 * epoch : 5 * epoch + 5]) == sorted(wanted) for epoch in range(3))


def test_a_stage_learns_from_its_first_problems_only_where_it_was_asked_to(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, varied, SRL | {"examples": 2}, RLVR)
    steps = run.train["steps"].to_pylist()[:2] + [[]] * 4  # the others have an answer only
    index = run.train.schema.get_field_index("steps")
    run.train = run.train.set_column(index, "steps", pa.array(steps, run.train.schema.field("steps").type))
    run.execute()
    learned: dict[str, set[str]] = {"srl": set(), "rlvr": set(), "evaluation": set()}
    for _, stage, ids, _ in asked(run, "sample"):
        learned[stage] |= {prompt_id.partition(":")[0] for prompt_id in ids}
    ids = run.train["id"].to_pylist()
    assert (learned["srl"], learned["rlvr"]) == (set(ids[:2]), set(ids))


# Interruption


def comparable(run: Run) -> list[Any]:
    return [entry for entry in run.crew.log if entry[0] != "begin_stage"]  # type: ignore[attr-defined]


def stopping_after(steps: int) -> Callable[[], bool]:
    """Stops from the `steps`-th question on; the run asks after each step and between two stages."""
    asked_for = iter(range(1, 10**6))
    return lambda: next(asked_for) >= steps


STAGES = (SFT, SRL, RLVR)


def test_a_stop_finishes_the_step_saves_it_and_says_so(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, varied, *STAGES)
    run.should_stop = stopping_after(5)
    with pytest.raises(Stopped, match="^stopped after step 1 of srl; everything up to here is saved$") as caught:
        run.execute()
    assert caught.value.exit_code == 130
    folder = checkpoints.latest(tmp_path)
    assert folder is not None
    state, history = checkpoints.read(folder)
    assert (state.stage, state.step, state.version, len(history.metrics)) == (1, 1, 4, 4)


def test_a_stop_between_two_stages_does_not_begin_the_next(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, varied, *STAGES)
    run.should_stop = stopping_after(4)
    with pytest.raises(Stopped, match="^stopped after sft; everything up to here is saved$"):
        run.execute()
    folder = checkpoints.latest(tmp_path)
    assert folder is not None
    state, _ = checkpoints.read(folder)
    assert (state.stage, state.step, state.version) == (1, 0, 3)


@pytest.mark.parametrize("every", [1, 3, 4])
def test_an_interrupted_run_asks_for_the_same_as_an_uninterrupted_one(
    tokenizer: Any, tmp_path: Path, every: int
) -> None:
    """The same prompts, seeds, samples and updates in the same order: no example twice, none skipped."""
    whole = make_run(tokenizer, tmp_path / "whole", mixed, *STAGES)
    whole.execute()
    out, log, state, history, rollouts = tmp_path / "cut", [], State(), History(), whole.rollouts
    for _ in range(100):
        run = make_run(tokenizer, out, mixed, *STAGES)
        assert isinstance(run.crew, ScriptedCrew)
        folder = checkpoints.latest(out)
        if folder is not None:
            run.state, run.history = checkpoints.read(folder)
            run.crew.load(folder)
            run.crew.hand_over()
        run.should_stop = stopping_after(every)
        state, history, rollouts = run.state, run.history, run.rollouts
        try:
            run.execute()
            log += comparable(run)
            break
        except Stopped:
            log += comparable(run)
    assert log == comparable(whole)
    assert state.held_out == whole.state.held_out and state.sampled_tokens == whole.state.sampled_tokens
    assert (state.version, state.stage) == (whole.state.version, whole.state.stage)

    def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: v for name, v in row.items() if not name.endswith(("seconds", "_s"))} for row in rows]

    assert timeless(history.metrics) == timeless(whole.history.metrics)
    assert rollouts.read() == whole.rollouts.read() and rollouts.rows > 0


def test_a_run_that_died_between_checkpoints_repeats_only_what_was_not_saved(tokenizer: Any, tmp_path: Path) -> None:
    whole = make_run(tokenizer, tmp_path / "whole", mixed, SRL)
    whole.execute()
    dying = make_run(tokenizer, tmp_path / "cut", mixed, SRL)

    def die_at_fourth(samples: pa.Table, spec: UpdateSpec) -> dict[str, float]:
        if dying.state.step == 3:
            raise RunError("the learner died")
        return ScriptedCrew.update(dying.crew, samples, spec)  # type: ignore[arg-type]

    dying.crew.update = die_at_fourth
    with pytest.raises(RunError, match="the learner died"):
        dying.execute()
    folder = checkpoints.latest(tmp_path / "cut")
    assert folder is not None
    resumed = make_run(tokenizer, tmp_path / "cut", mixed, SRL)
    resumed.state, resumed.history = checkpoints.read(folder)
    resumed.crew.load(folder)
    resumed.crew.hand_over()
    assert resumed.state.step == 2
    resumed.execute()
    remaining = comparable(resumed)
    assert remaining == comparable(whole)[-len(remaining) :]


def test_own_thoughts_are_drawn_once_when_their_stage_begins_and_kept(tokenizer: Any, tmp_path: Path) -> None:
    stages = SRL, SRL | {"name": "own", "own_thoughts": True}
    run = make_run(tokenizer, tmp_path, varied, *stages, think=True)
    every = srl.prompts(run.train, tokenizer, configs.SrlStage.model_validate(SRL), think=True)["id"].to_pylist()
    run.should_stop = lambda: run.state.stage == 1 and run.state.step == 2
    with pytest.raises(Stopped):
        run.execute()
    assert sum(ids == every for _, _, ids, _ in asked(run, "sample")) == 1
    assert run.state.thoughts is not None and set(run.state.thoughts) == set(every)
    resumed = make_run(tokenizer, tmp_path, varied, *stages, think=True)
    from_checkpoint(resumed)
    assert resumed.state.thoughts == run.state.thoughts
    resumed.execute()
    assert every not in [ids for _, _, ids, _ in asked(resumed, "sample")] and resumed.state.thoughts is None


def test_sft_learns_the_steps_that_its_own_thoughts_found(tokenizer: Any, tmp_path: Path) -> None:
    def script(prompt_id: str, index: int, seed: int) -> tuple[str, float]:
        return "scored", 1.0 if prompt_id in found and index == 1 else 0.5

    stage = SFT | {"own_thoughts": True, "epochs": 1, "samples": 3}
    run = make_run(tokenizer, tmp_path, script, stage, think=True)
    found = {srl.step_id(run.train["id"][0].as_py(), 0)}
    run.execute()
    _, _, ids, spec = next(entry for entry in asked(run, "sample") if entry[1] == "sft")
    drawn_as = sft.drawing(configs.SftStage.model_validate(stage))
    assert ids == srl.prompts(run.train, tokenizer, drawn_as, think=True)["id"].to_pylist()
    assert (spec.samples, spec.max_tokens) == (3, 128)
    taught = {row["prompt_id"] for _, samples, _ in asked(run, "update") for row in samples}
    assert taught == {run.train["id"][0].as_py()}

    found.clear()
    with pytest.raises(RunError, match="in 3 samples of each the policy found the first step of no problem"):
        make_run(tokenizer, tmp_path / "none", script, stage, think=True).execute()


# Overlap: batches are sent ahead


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_batches_are_sent_ahead_and_no_rollout_is_older_than_allowed(
    tokenizer: Any, tmp_path: Path, max_staleness: int
) -> None:
    run = make_run(tokenizer, tmp_path, varied, RLVR | {"steps": 7}, max_staleness=max_staleness)
    run.execute()
    sent = updates = 0
    for entry in run.crew.log:  # type: ignore[attr-defined]
        updates += entry[0] == "update"
        if entry[0] == "sample" and entry[1] == "rlvr":
            sent += 1
            assert sent == min(7, updates + max_staleness + 1) or updates == 0
    assert sent == updates == 7
    assert [row["staleness"] for row in run.history.metrics] == [min(step, max_staleness) for step in range(7)]


@pytest.mark.parametrize("script", [varied, mixed], ids=["without refills", "with refills"])
def test_every_prompt_that_is_drawn_ahead_is_learned_from_once(tokenizer: Any, tmp_path: Path, script: Script) -> None:
    run = make_run(tokenizer, tmp_path, script, RLVR | {"steps": 7}, max_staleness=2)
    run.execute()
    assert drawn(run) == stream(run, len(drawn(run)))
    assert [i for ids in run.crew.received for i in ids] == drawn(run)  # type: ignore[attr-defined]
    assert run.state.pending == []


def stream(run: Run, count: int) -> list[str]:
    """The first prompts of the RLVR stage, in the order in which they have to be drawn."""
    ids = run.train["id"].to_pylist()
    order = Order(ids, 0, "rlvr")
    return [ids[row] for cursor in range(count) for row in order.take(cursor, 1)]


def half(prompt_id: str, index: int, seed: int) -> tuple[str, float]:
    """Half of the problems carry no signal."""
    return records.SCORED, float(index % 2 and int(prompt_id, 16) % 2)


def test_batches_sent_ahead_are_drawn_larger_instead_of_being_refilled(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, half, RLVR | {"steps": 30}, max_staleness=1)
    run.execute()
    assert run.crew.received == [ids for _, stage, ids, _ in asked(run, "sample") if stage == "rlvr"]  # type: ignore[attr-defined]
    assert len(run.crew.received) == 30  # type: ignore[attr-defined]
    drawn_of = [row["groups_drawn"] for row in run.history.metrics]
    assert drawn_of[:2] == [2.0, 2.0]  # nothing is known yet
    share = sum(int(i, 16) % 2 for i in run.train["id"].to_pylist()) / run.train.num_rows
    assert abs(sum(drawn_of[10:]) / 20 - 2 / share) <= 1


def test_no_more_is_drawn_ahead_than_the_refills_would(tokenizer: Any, tmp_path: Path) -> None:
    stage = RLVR | {"steps": 8, "max_refills": 1}
    run = make_run(tokenizer, tmp_path, lambda *_: ("scored", 0.0), stage, max_staleness=1)
    run.execute()
    assert max(row["groups_drawn"] for row in run.history.metrics) == 4.0


@pytest.mark.parametrize("script", [varied, mixed], ids=["without refills", "with refills"])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("later", [0, 1, 3])
def test_what_was_sent_ahead_of_a_stop_is_sent_again_before_new_prompts(
    tokenizer: Any, tmp_path: Path, script: Script, every: int, later: int
) -> None:
    """Stopped again and again: every batch of the stream is learned from once, in order, whatever `later` allows."""
    received: list[list[str]] = []
    for round in range(100):
        max_staleness = 2 if round == 0 else later
        run = make_run(tokenizer, tmp_path, script, RLVR | {"steps": 7}, max_staleness=max_staleness)
        folder = checkpoints.latest(tmp_path)
        if folder is not None:
            run.state, run.history = checkpoints.read(folder)
            run.crew.load(folder)
            run.crew.hand_over()
        run.should_stop = stopping_after(every)
        before = run.state.step, len(run.state.pending)
        try:
            run.execute()
            break
        except Stopped:
            ahead = min(max(max_staleness, before[1] - every), 7 - run.state.step)
            assert run.state.step == before[0] + every and len(run.state.pending) == ahead
        finally:
            received += run.crew.received  # type: ignore[attr-defined]
    assert (run.state.step, run.state.pending, run.state.stage) == (0, [], 1)
    assert len(run.history.metrics) == 7
    count = sum(map(len, received))
    assert sorted(i for ids in received for i in ids) == sorted(stream(run, count))
    if script is varied or later:  # in turn, refills are drawn after what was drawn before
        assert [i for ids in received for i in ids] == stream(run, count)
    assert all(row["staleness"] <= 2 for row in run.history.metrics)


# Evaluation


def test_failed_verifications_do_not_count_against_the_model(tokenizer: Any, tmp_path: Path) -> None:
    outcomes = iter([("scored", 1.0), ("failed", 0.0), ("invalid", 0.0)])
    run = make_run(tokenizer, tmp_path, lambda *_: next(outcomes), RLVR)
    run._evaluate("base")
    assert run.state.held_out["base"][0] == 0.5
    assert notes(run)[0] == "base: 1 verifications failed and do not count"


def test_metrics_are_of_predictions_that_were_judged(tokenizer: Any) -> None:
    outcomes = iter([("scored", 1.0), ("failed", 0.0), ("invalid", 0.0)])
    _, predictions = pipeline.evaluate(problems(3), tokenizer, ScriptedCrew(lambda *_: next(outcomes)), False, 8)
    assert [found["outcome"] for found in pipeline.judged(predictions)] == ["scored", "invalid"]


def test_an_evaluation_that_judged_nothing_ends_the_run(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, lambda *_: ("failed", 0.0), RLVR)
    with pytest.raises(RunError, match="^base: all 3 verifications failed"):
        run.execute()


def test_predictions_stand_beside_their_own_problems(tokenizer: Any) -> None:
    crew, examples = ScriptedCrew(varied), problems(3)
    _, predictions = pipeline.evaluate(examples, tokenizer, crew, False, 8)
    assert [prediction["id"] for prediction in predictions] == examples["id"].to_pylist()

    class Confused(ScriptedCrew):
        def sample(self, prompts: pa.Table, spec: SamplingSpec) -> tuple[pa.Table, pa.Table, dict[str, float]]:
            rollouts, verdicts, seconds = super().sample(prompts, spec)
            return rollouts.take(pa.array([1, 0, 2])), verdicts, seconds

    with pytest.raises(RunError, match="^rollout of .* stands where problem .* should$"):
        pipeline.evaluate(examples, tokenizer, Confused(varied), False, 8)


def refused(config: Any, train: pa.Table, evaluated: pa.Table, tokenizer: Any, limit: int = 1024) -> str:
    with pytest.raises(InputError) as caught:
        pipeline.fitting(train, [evaluated], tokenizer, config, limit)
    return str(caught.value)


def test_a_problem_that_fills_the_context_is_named_before_the_run(tokenizer: Any) -> None:
    config = configs.parse({"data": [{"family": "x"}], "stages": [RLVR, SRL], "model": {"max_context": 300}}, "test")
    three, none = problems(3), problems(3)[:0]
    pipeline.fitting(three, [three], tokenizer, config, 1024)
    assert refused(config, three, none, tokenizer, 100) == (
        "model.max_context is 300, but the model was made for at most 100 tokens"
    )
    named = (
        r"problem \w+ \(.*\) {} \d+ tokens long and model.max_context is {}: raise it, or leave out what does not fit "
        "by --skip-bad"
    )
    prompts = [len(ids) for ids in pipeline.rlvr.prompts(three, tokenizer, "x", False)["token_ids"].to_pylist()]
    config.model.max_context = longest = max(prompts)
    assert re.fullmatch(named.format("is", longest), refused(config, none, three, tokenizer))
    config.model.max_context = longest = max(prompts) + 1
    before_the_last = named.format("and the steps before its last are", longest)
    assert re.fullmatch(before_the_last, refused(config, three, none, tokenizer))
    pipeline.fitting(none, [three], tokenizer, config, 1024)


@pytest.mark.parametrize(("stage", "count"), [(RLVR, 3), (SRL, 3), (SFT, 0)])
def test_problems_that_leave_less_than_max_tokens_are_counted(
    stage: Any, count: int, tokenizer: Any, caplog: Any
) -> None:
    three = problems(3)
    prompts = [len(ids) for ids in pipeline.rlvr.prompts(three, tokenizer, "x", False)["token_ids"].to_pylist()]
    context = 2 * max(prompts)
    asked = {"max_tokens": context - min(prompts) + 1} if stage is not SFT else {}
    tree = {"data": [{"family": "x"}], "stages": [stage | asked], "model": {"max_context": context}}
    pipeline.fitting(three, [three[:0]], tokenizer, configs.parse(tree, "test"), 10_000)
    found = re.search(rf"model.max_context = {context} .*: (\d+) of 3$", caplog.text, re.MULTILINE)
    assert (int(found[1]) if found else 0) == count


@pytest.mark.parametrize("stage", [SFT, {"kind": "dpo", "steps": 1}])
def test_a_solution_that_the_context_cannot_hold_is_named_before_it_is_learned(stage: Any, tokenizer: Any) -> None:
    one = problems(1)
    (learned,) = pipeline.sft.samples(one, tokenizer, think=False).to_pylist()
    whole = len(learned["prompt_ids"]) + len(learned["completion_ids"])
    config = configs.parse(
        {"data": [{"family": "x"}], "stages": [stage, RLVR], "model": {"max_context": whole}}, "test"
    )
    pipeline.fitting(one, [], tokenizer, config, 1024)
    config.model.max_context = whole - 1
    found = refused(config, one, one[:0], tokenizer)
    assert re.fullmatch(rf"problem \w+ \(.*\) and its solution are {whole} tokens long and .*", found)
    config.stages = config.stages[1:]
    pipeline.fitting(one, [one], tokenizer, config, 1024)


def test_srl_asks_for_room_only_in_the_problems_that_it_takes(tokenizer: Any) -> None:
    short, *_ = sorted(problems(8).to_pylist(), key=lambda row: len(row["steps"]))
    long = short | {"steps": short["steps"] * 20}
    table = pa.Table.from_pylist([short, long], problems(1).schema)
    data = {"data": [{"family": "x"}], "model": {"max_context": 300}}
    for given, fits in ({"examples": 1}, True), ({"examples": 2}, False), ({}, False):
        config = configs.parse(data | {"stages": [SRL | given, RLVR]}, "test")
        if fits:
            pipeline.fitting(table, [], tokenizer, config, 1024)
        else:
            assert refused(config, table, table[:0], tokenizer).startswith(f"problem {long['id']} ")


def test_problems_that_do_not_fit_are_left_out_where_it_is_asked_for(tokenizer: Any, caplog: Any) -> None:
    *short, last = sorted(problems(8).to_pylist(), key=lambda row: len(row["steps"]))
    long = last | {"id": "long", "steps": last["steps"] * 20}
    table = pa.Table.from_pylist([long, *short], problems(1).schema)
    data = [{"family": "x", "skip_bad": True}]
    config = configs.parse({"data": data, "stages": [SRL, RLVR], "model": {"max_context": 300}}, "test")
    train, held_out = pipeline.fitting(table, [table], tokenizer, config, 1024)
    assert train.to_pylist() == short and held_out == table
    assert re.search("problems too long, and left out: 1; the first: problem long ", caplog.text)
    config.stages[0].examples = len(table)  # of what is left: the last, too, is one that SRL takes
    assert pipeline.fitting(pa.concat_tables([table, table[:1]]), [], tokenizer, config, 1024) == [train]
    config.data.append(config.data[0].model_copy(update={"skip_bad": False}))
    assert refused(config, table, table, tokenizer).startswith("problem long ")
    del config.data[1]
    assert refused(config, table[:1], table, tokenizer).endswith("max_context is 300, and none of the 1 fits: raise it")


# What a reader sees


def test_kept_rollouts_carry_the_advantage_they_were_trained_with(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, mixed, RLVR | {"steps": 1}, tracking={"rollouts_per_step": 1})
    run.execute()
    trained = {(r["prompt_id"], r["sample_index"]): r["advantage"] for _, rows, _ in asked(run, "update") for r in rows}
    kept = run.rollouts.read().to_pylist()
    assert len(kept) == 4
    for row in kept:
        key = row["prompt_id"], row["sample_index"]
        assert row["advantage"] in (0.0, pytest.approx(trained.get(key, 0.0)))
        assert len(row["tokens"]) == len(row["logprobs"]) == 2


def test_a_long_run_holds_no_rollouts(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, varied, RLVR | {"steps": 150}, checkpoint_every=10)
    seen: list[int] = []

    def step(metrics: dict[str, Any]) -> None:
        run.crew.log.clear()  # type: ignore[attr-defined]
        run.crew.received.clear()  # type: ignore[attr-defined]
        if metrics["step"] % 50 == 49:
            gc.collect()
            seen.append(len(gc.get_objects()))

    run.observer.step = step
    run.execute()
    assert run.rollouts.rows == 150 * 2 * 4 == run.rollouts.read().num_rows
    assert seen[-1] - seen[0] < 150  # not one object a step


def test_the_scores_on_dev_are_in_the_state_with_the_steps_made(tokenizer: Any, tmp_path: Path) -> None:
    run = run_with_dev(tokenizer, tmp_path, 2, RLVR | {"steps": 4}, every=2)
    run.execute()
    in_metrics = [[n, row["dev"]] for n, row in enumerate(run.history.metrics, 1) if "dev" in row]
    folder = checkpoints.latest(tmp_path)
    assert folder is not None
    assert checkpoints.read_state(folder).dev_scores == in_metrics and len(in_metrics) == 2


@pytest.mark.parametrize("stage", [RLVR, {"kind": "dpo", "steps": 3, "prompts_per_step": 2}])
def test_answers_that_are_all_cut_off_are_said_with_the_key(
    tokenizer: Any, tmp_path: Path, stage: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = ScriptedCrew.send

    def cut_off(crew: Any, prompts: pa.Table, spec: SamplingSpec) -> Any:
        prompts, (rollouts, verdicts, seconds) = send(crew, prompts, spec)
        ends = pa.array(["length"] * rollouts.num_rows)
        place = rollouts.column_names.index("finish_reason")
        return prompts, (rollouts.set_column(place, records.ROLLOUT.field(place), ends), verdicts, seconds)

    monkeypatch.setattr(ScriptedCrew, "send", cut_off)
    run = make_run(tokenizer, tmp_path, lambda *_: ("scored", 0.0), stage)
    run.execute()
    said = "\n".join(note for note in notes(run) if note.startswith("WARNING"))
    assert f"stages.{stage['kind']}.max_tokens" in said and "evaluation.max_tokens" in said
    idle = run.without_update()
    assert [line.split()[0] for line in idle] == (["rlvr"] if stage["kind"] == "rlvr" else [])


# The best weights on the dev problems


def run_with_dev(
    tokenizer: Any, out: Path, best: int, *stages: dict[str, Any], every: int = 1, patience: int = 0, **settings: Any
) -> Run:
    """`best` is the update after which all four dev problems are solved; one less for each update away from it."""
    settings |= {"evaluation": {"every": every, "patience": patience}, "data": [{"family": "chain_sum", "dev": 4}]}
    run = make_run(tokenizer, out, varied, *stages, **settings)
    dev = run.dev = problems(4, first=200)
    ids = dev["id"].to_pylist()
    crew: Any = run.crew

    def script(prompt_id: str, index: int, seed: int) -> tuple[str, float]:
        if prompt_id in ids:
            return records.SCORED, float(ids.index(prompt_id) < 4 - abs(crew.holds - best))
        return varied(prompt_id, index, seed)

    crew.script = script
    return run


def test_a_stage_ends_with_the_weights_that_were_best_on_the_dev_problems(tokenizer: Any, tmp_path: Path) -> None:
    run = run_with_dev(tokenizer, tmp_path, 2, {**SRL, "max_refills": 0})
    run.execute()
    crew: Any = run.crew
    assert [step["dev"] for step in run.observer.steps] == [0.75, 1.0, 0.75, 0.5, 0.25]  # type: ignore[attr-defined]
    assert crew.holds == 2
    assert (
        crew.learned == crew.served == run.state.version == 6
    )  # five updates and the way back, which is a version, too
    assert "srl: ends with the weights of step 2: 100.0% of dev solved" in notes(run)


def test_the_weights_before_a_stage_stand_where_it_only_hurt(tokenizer: Any, tmp_path: Path) -> None:
    run = run_with_dev(tokenizer, tmp_path, 0, SFT)
    run.execute()
    assert run.crew.holds == 0  # type: ignore[attr-defined]
    assert any("of its beginning" in note for note in notes(run))


def test_of_equally_good_weights_the_newest_stand(tokenizer: Any, tmp_path: Path) -> None:
    run = run_with_dev(tokenizer, tmp_path, 99, SFT)  # none of them solves any
    run.execute()
    assert run.crew.holds == run.state.version == 3  # type: ignore[attr-defined]


def test_dev_problems_are_looked_at_as_often_as_asked_and_after_the_last_step(tokenizer: Any, tmp_path: Path) -> None:
    run = run_with_dev(tokenizer, tmp_path, 5, {**SRL, "max_refills": 0}, every=3)
    run.execute()
    assert ["dev" in step for step in run.observer.steps] == [False, False, True, False, True]  # type: ignore[attr-defined]


def test_a_stage_is_not_looked_at_anew_where_the_one_before_ended(tokenizer: Any, tmp_path: Path) -> None:
    stage = {**SRL, "max_refills": 0}
    run = run_with_dev(tokenizer, tmp_path, 2, stage, {**stage, "name": "again"})
    run.execute()
    looks = [entry for entry in asked(run, "sample") if entry[1] == "evaluation"]
    of_held_out = 3  # base, and after each stage
    assert len(looks) == of_held_out + 1 + 2 * SRL["steps"]
    assert run.crew.holds == 2  # type: ignore[attr-defined]
    assert "again: ends with the weights of its beginning: 100.0% of dev solved" in notes(run)


@pytest.mark.parametrize(("patience", "steps"), [(1, 3), (2, 4), (9, 5)])
@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_stage_ends_early_where_so_many_looks_find_it_below_its_best(
    tokenizer: Any, tmp_path: Path, patience: int, steps: int, max_staleness: int
) -> None:
    stages = {**SRL, "max_refills": 0}, {**RLVR, "steps": 1, "max_refills": 0}
    run = run_with_dev(tokenizer, tmp_path, 2, *stages, patience=patience, max_staleness=max_staleness)
    run.execute()
    taken = [row["stage"] for row in run.observer.steps]  # type: ignore[attr-defined]
    assert taken == ["srl"] * steps + ["rlvr"]
    assert run.state.stage == 2 and run.state.pending == []
    crew: Any = run.crew
    assert sum(entry[0] == "sample" and entry[1] != "evaluation" for entry in crew.log) == len(crew.received)


def test_a_stage_that_was_to_end_early_does_so_after_an_interruption(tokenizer: Any, tmp_path: Path) -> None:
    run = run_with_dev(tokenizer, tmp_path, 2, SRL, patience=1)
    asked_to_stop = iter([False, False, True])
    run.should_stop = lambda: next(asked_to_stop)
    with pytest.raises(Stopped):
        run.execute()
    resumed = run_with_dev(tokenizer, tmp_path, 2, SRL, patience=1)
    from_checkpoint(resumed)
    resumed.execute()
    assert len(resumed.history.metrics) == 3 and resumed.crew.holds == 2  # type: ignore[attr-defined]


def test_a_crash_after_a_look_leaves_the_best_of_the_checkpoint(tokenizer: Any, tmp_path: Path) -> None:
    """What is sampled after it may be other than before: with overlap, on GPUs, by several workers."""
    stage = {**SRL, "max_refills": 0}
    run = run_with_dev(tokenizer, tmp_path, 4, stage)  # checkpoints after steps 2 and 4
    run.observer.step = lambda metrics: (_ for _ in ()).throw(RuntimeError) if metrics["step"] == 3 else None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):  # the look at step 4 has found it the best, and no checkpoint says so
        run.execute()
    assert len(list(tmp_path.glob("best-*"))) == 2
    resumed = run_with_dev(tokenizer, tmp_path, 0, stage)  # in this life it only gets worse
    from_checkpoint(resumed)
    resumed.execute()
    assert resumed.crew.holds == 2  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.glob("best-*")] == [resumed.state.best]


def test_dev_problems_of_which_none_can_be_verified_end_the_run(tokenizer: Any, tmp_path: Path) -> None:
    run = run_with_dev(tokenizer, tmp_path, 2, SRL)
    crew: Any = run.crew
    of_dev = run.dev["id"].to_pylist()  # type: ignore[index]
    fails = records.FAILED, 0.0
    crew.script = lambda prompt_id, index, seed: fails if prompt_id in of_dev else varied(prompt_id, index, seed)
    with pytest.raises(RunError, match="srl, dev: all 4 verifications failed"):
        run.execute()


def test_the_best_is_found_again_after_an_interruption(tokenizer: Any, tmp_path: Path) -> None:
    stage = {**SRL, "max_refills": 0}
    run = run_with_dev(tokenizer, tmp_path, 2, stage)
    asked_to_stop = iter([False, False, False, True])
    run.should_stop = lambda: next(asked_to_stop)
    with pytest.raises(Stopped):
        run.execute()
    resumed = run_with_dev(tokenizer, tmp_path, 2, stage)
    from_checkpoint(resumed)
    resumed.execute()
    assert resumed.crew.holds == 2 and resumed.state.version == 6  # type: ignore[attr-defined]


# Preference


DPO = {"kind": "dpo", "steps": 3, "prompts_per_step": 4, "beta": 0.2}


def test_each_wrong_answer_is_paired_with_the_experts_solution(tokenizer: Any, tmp_path: Path) -> None:
    def script(prompt_id: str, index: int, seed: int) -> tuple[str, float]:
        kinds = [(records.SCORED, 1.0), (records.SCORED, 0.0), (records.INVALID, 0.0), (records.FAILED, 0.0)]
        return kinds[int(prompt_id[:8], 16) % 4]

    run = make_run(tokenizer, tmp_path, script, DPO)
    run.execute()
    assert asked(run, "begin_stage") == [("begin_stage", True)]
    wrong = {i for i in run.train["id"].to_pylist() if script(i, 0, 0)[0] != records.FAILED and script(i, 0, 0)[1] < 1}
    assert 0 < len(wrong) < run.train.num_rows
    experts = {row["prompt_id"]: row for row in sft.samples(run.train, tokenizer, False).to_pylist()}
    drawn_ids = drawn(run)
    learned = [
        row for _, rows, spec in asked(run, "update") for row in rows if (spec.loss, spec.beta) == ("preference", 0.2)
    ]
    assert [row["prompt_id"] for row in learned[::2]] == [i for i in drawn_ids if i in wrong]
    for chosen, rejected in zip(learned[::2], learned[1::2], strict=True):
        assert chosen == experts[chosen["prompt_id"]]
        assert rejected["prompt_ids"] == chosen["prompt_ids"] and rejected["completion_ids"] == [5, 0]
        assert (chosen["sample_index"], rejected["sample_index"]) == (0, 1)


def test_solved_problems_make_no_pair_and_that_is_said(tokenizer: Any, tmp_path: Path) -> None:
    run = make_run(tokenizer, tmp_path, lambda *_: (records.SCORED, 1.0), DPO)
    run.execute()
    assert not asked(run, "update") and run.state.version == 0
    assert "dpo, step 1: every problem is solved; no update" in notes(run)


@pytest.mark.parametrize(("lost", "rate"), [(3, 1.0), (6, 0.0)])
def test_what_could_not_be_verified_is_neither_solved_nor_wrong(
    tokenizer: Any, tmp_path: Path, lost: int, rate: float
) -> None:
    failed = set(problems(6)["id"].to_pylist()[:lost])
    stage = DPO | {"prompts_per_step": 6}
    run = make_run(
        tokenizer, tmp_path, lambda i, *_: (records.FAILED, 0.0) if i in failed else (records.SCORED, 1.0), stage
    )
    run.execute()
    rows = run.history.metrics_table().to_pylist()
    assert {row["pass_rate"] for row in rows} == {rate} and {row["failed"] for row in rows} == {lost}
    why = "every problem is solved" if lost < 6 else "no answer could be verified"
    assert f"dpo, step 1: {why}; no update" in notes(run)


def test_the_curriculum_draws_where_groups_tell_most_and_goes_on_after_an_interruption(
    tokenizer: Any, tmp_path: Path
) -> None:
    stage = {**RLVR, "steps": 12, "curriculum": "informative", "max_refills": 0}
    levels = {row["id"]: row["difficulty"] for row in problems(6).to_pylist()}

    def script(prompt_id: str, index: int, seed: int) -> tuple[str, float]:
        """Level 1 is always solved, level 2 by every other sample, level 3 never."""
        level = levels.get(prompt_id, 0)
        return records.SCORED, float(level == 1 or (level == 2 and index % 2))

    whole = make_run(tokenizer, tmp_path / "whole", script, stage)
    whole.execute()
    last = [levels[i] for i in drawn(whole)[-12:]]
    assert last.count(2) > 2 * max(last.count(1), last.count(3))

    first = make_run(tokenizer, tmp_path / "cut", script, stage)
    asked_to_stop = iter([False] * 4 + [True])
    first.should_stop = lambda: next(asked_to_stop)
    with pytest.raises(Stopped):
        first.execute()
    second = make_run(tokenizer, tmp_path / "cut", script, stage)
    folder = checkpoints.latest(tmp_path / "cut")
    assert folder is not None
    second.state, second.history = checkpoints.read(folder)
    second.crew.load(folder)
    second.crew.hand_over()
    second.execute()
    assert drawn(first) + drawn(second) == drawn(whole)
