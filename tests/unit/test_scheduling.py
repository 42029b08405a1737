"""Who gets which task and when: held to its promises under random events, without Ray and without a clock."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from srl_rlvr import config as configs
from srl_rlvr import records, scheduling
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.scheduling import Scheduler, Task, Ticket, admits, exact_ticket, free_ticket

SPEC = SamplingSpec(samples=4, temperature=1.0, max_tokens=8, seed=11)


def prompts(trunks: list[str]) -> pa.Table:
    rows = [
        {
            "id": f"{trunk}:{row}", "example_id": trunk, "stage": "srl", "step_index": row, "token_ids": [1, 2],
            "trunk_id": trunk, "offset": 2, "verifier": "similarity", "reference": "", "metadata": "{}",
        }
        for row, trunk in enumerate(trunks)
    ]  # fmt: skip
    return records.build("Prompt", rows)


def tasks(count: int, pinned: int | None = None) -> list[Task]:
    table = prompts(["a"])
    ticket = Ticket()
    ticket.tasks = [Task(ticket, index, table, SPEC, pinned) for index in range(count)]
    return ticket.tasks


def cut(ticket: Ticket) -> list[list[str]]:
    return [task.prompts["trunk_id"].to_pylist() for task in ticket.tasks]


# Cutting


TRUNKS = ["a", "a", "a", "b", "c", "c", "d", "e"]


@pytest.mark.parametrize("generators", [1, 2, 3, 5, 9])
def test_the_steps_of_one_problem_stay_together_and_in_order(generators: int) -> None:
    table = prompts(TRUNKS)
    for ticket in (
        exact_ticket(table, SPEC, generators),
        *(free_ticket(table, SPEC, generators, max_running) for max_running in (1, 8, 12, 64)),
    ):
        assert [i for task in ticket.tasks for i in task.prompts["id"].to_pylist()] == table["id"].to_pylist()
        for trunk in set(TRUNKS):
            assert sum(trunk in of_task for of_task in cut(ticket)) == 1
        assert [task.index for task in ticket.tasks] == list(range(len(ticket.tasks)))


def test_in_turn_each_generator_has_one_task_of_its_own() -> None:
    ticket = exact_ticket(prompts(TRUNKS), SPEC, 3)
    assert cut(ticket) == [["a", "a", "a"], ["b", "c", "c"], ["d", "e"]]
    assert [task.pinned for task in ticket.tasks] == [0, 1, 2]
    assert len({task.spec.seed for task in ticket.tasks}) == 3 and ticket.tasks[0].spec == SPEC


def test_a_free_task_fills_an_engine_and_no_more() -> None:
    singles = prompts([str(n) for n in range(10)])
    assert list(map(len, cut(free_ticket(singles, SPEC, 1, 16)))) == [4, 4, 2]
    assert list(map(len, cut(free_ticket(singles, SPEC, 4, 64)))) == [3, 3, 3, 1]
    assert cut(free_ticket(prompts(["a"] * 5 + ["b"]), SPEC, 4, 8)) == [["a"] * 5, ["b"]]
    ticket = free_ticket(singles, SPEC, 4, 64)
    assert len({task.spec.seed for task in ticket.tasks}) == 4 and ticket.tasks[0].spec == SPEC
    assert all(task.pinned is None for task in ticket.tasks)


# Order


def test_a_ticket_gives_its_answers_in_the_order_of_its_prompts() -> None:
    ticket = free_ticket(prompts(TRUNKS), SPEC, 4, 8)
    answered = []
    for task in reversed(ticket.tasks):
        ids = task.prompts["id"].to_pylist()
        rollouts = [
            {
                "prompt_id": i, "sample_index": 0, "policy_version": 0, "token_ids": [1], "logprobs": [0.0], "text": "",
                "finish_reason": "stop",
            }
            for i in ids
        ]  # fmt: skip
        verdicts = [
            {"prompt_id": i, "sample_index": 0, "outcome": "scored", "reward": 0.0, "components": "{}", "detail": ""}
            for i in ids
        ]
        answered.append(ticket.answer(task, records.build("Rollout", rollouts), records.build("Verdict", verdicts)))
    assert answered == [False] * (len(ticket.tasks) - 1) + [True]
    for table in ticket.tables():
        assert table["prompt_id"].to_pylist() == prompts(TRUNKS)["id"].to_pylist()


def test_tasks_go_out_in_the_order_in_which_they_were_sent() -> None:
    scheduler = Scheduler(1, window=1)
    sent = [*tasks(3), *tasks(2)]
    scheduler.send(sent[:3])
    order = [task for _, task in scheduler.assign()]
    scheduler.send(sent[3:])
    while scheduler.held(0):
        scheduler.finished(0, order[-1])
        order += [task for _, task in scheduler.assign()]
    assert order == sent


def test_the_least_loaded_generator_comes_first() -> None:
    scheduler = Scheduler(3)
    first, *_ = tasks(1)
    scheduler.send([first])
    assert scheduler.assign() == [(0, first)]
    scheduler.send(tasks(2))
    assert [generator for generator, _ in scheduler.assign()] == [1, 2]


def test_a_second_task_is_queued_behind_a_running_one_only_where_many_wait() -> None:
    scheduler = Scheduler(2)
    sent = tasks(4)
    scheduler.send(sent)
    assert len(scheduler.assign()) == 2 and scheduler.waiting == 2
    scheduler.send(tasks(1))
    assert len(scheduler.assign()) == 1 and scheduler.waiting == 2
    scheduler.finished(1, scheduler.held(1)[0])
    assert [generator for generator, _ in scheduler.assign()] == [1]


def test_pinned_tasks_wait_for_their_generator() -> None:
    scheduler = Scheduler(2, window=1)
    scheduler.send(tasks(3, pinned=1))
    (placed,) = scheduler.assign()
    assert placed[0] == 1 and scheduler.held(0) == [] and scheduler.waiting == 2
    scheduler.died(1)
    assert scheduler.assign() == [] and scheduler.waiting == 3
    scheduler.revived(1)
    assert scheduler.assign() == [placed]


# Death


def test_what_a_dead_generator_held_goes_to_others_first_and_in_order() -> None:
    scheduler = Scheduler(2)
    sent = tasks(6)
    scheduler.send(sent)
    placed = scheduler.assign()
    lost = [task for generator, task in placed if generator == 0]
    assert len(lost) == 2 and scheduler.died(0) == lost and lost[0].deaths == 1 and lost[1].deaths == 0
    order = []
    while scheduler.held(1):
        scheduler.finished(1, scheduler.held(1)[0])
        order += scheduler.assign()
    assert [task for _, task in order][:2] == lost and {generator for generator, _ in order} == {1}
    scheduler.revived(0)
    scheduler.send(tasks(2))
    assert {generator for generator, _ in scheduler.assign()} == {0, 1}


@pytest.mark.parametrize("seed", range(20))
def test_under_random_events_every_task_is_done_once_and_none_waits_beside_an_idle_generator(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.choice([1, 2, 5, 40])
    scheduler, dead, done, sent = Scheduler(n), set[int](), list[Task](), list[Task]()
    for _ in range(400):
        event = rng.choice(["send", "send", "send", "pinned", "finish", "finish", "finish", "finish", "die", "revive"])
        busy = [i for i in range(n) if scheduler.held(i)]
        if event in ("send", "pinned") and len(sent) < 300:
            new = tasks(rng.randint(1, 2 * n), pinned=rng.randrange(n) if event == "pinned" else None)
            scheduler.send(new)
            sent += new
        elif event == "finish" and busy:
            generator = rng.choice(busy)
            done.append(scheduler.held(generator)[0])
            scheduler.finished(generator, done[-1])
        elif event == "die" and len(dead) < n:
            dead.add(generator := rng.choice([i for i in range(n) if i not in dead]))
            scheduler.died(generator)
        elif event == "revive" and dead:
            scheduler.revived(generator := rng.choice(sorted(dead)))
            dead.remove(generator)
        for generator, task in scheduler.assign():
            assert generator not in dead and task.pinned in (None, generator)
        _check_invariants(scheduler, n, dead, sent, done)
    for generator in sorted(dead):
        scheduler.revived(generator)
    scheduler.assign()
    while busy := [i for i in range(n) if scheduler.held(i)]:
        for generator in busy:
            done.append(scheduler.held(generator)[0])
            scheduler.finished(generator, done[-1])
        scheduler.assign()
    assert len(done) == len(set(done)) == len(sent) and scheduler.waiting == 0


def _check_invariants(scheduler: Scheduler, n: int, dead: set[int], sent: list[Task], done: list[Task]) -> None:
    held = [scheduler.held(i) for i in range(n)]
    assert all(len(tasks) <= scheduling.WINDOW for tasks in held)
    assert not any(held[generator] for generator in dead)
    in_flight = [task for tasks in held for task in tasks]
    assert len(in_flight) == len(set(in_flight)) and not set(in_flight) & set(done)
    assert len(in_flight) + len(done) + scheduler.waiting == len(sent)
    left = [task for task in sent if task not in done and task not in in_flight]
    for generator in range(n):
        if generator not in dead and not held[generator]:
            assert not any(task.pinned in (None, generator) for task in left), "idle while a task waits"


# Admission


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_no_batch_is_sent_that_would_be_too_old_when_it_is_used(max_staleness: int) -> None:
    sent_at = {}
    for learned in range(10):
        while admits(len(sent_at), learned, max_staleness):
            sent_at[len(sent_at)] = learned
    assert len(sent_at) == 10 + max_staleness
    assert max(batch - learned for batch, learned in sent_at.items()) == max_staleness


# Planning


def config(**settings: object) -> configs.RunConfig:
    tree = {"data": [{"family": "sums"}], "stages": [{"kind": "rlvr"}], "max_staleness": 1} | settings
    return configs.parse(tree, "test")


@pytest.mark.parametrize(
    ("settings", "cores"),
    [
        ({}, 2),
        ({}, 64),
        ({"engine": {"threads": 1}}, 2),
        ({"engine": {"threads": 2}, "learner": {"threads": 1}}, 2),
        ({"engine": {"threads": 1, "generators": 2}, "learner": {"threads": 1}}, 2),
    ],
)
def test_on_shared_cores_a_run_takes_turns_and_is_told_what_to_set(settings: dict[str, object], cores: int) -> None:
    planned, remark = scheduling.plan(config(**settings), cores)
    assert planned.max_staleness == 0 and "\n" not in remark
    assert f"share {cores} cores" in remark and remark.endswith(f"at most {cores}")
    assert planned == config(**settings, max_staleness=0)


@pytest.mark.parametrize(
    ("settings", "cores"),
    [
        ({"engine": {"threads": 1}, "learner": {"threads": 1}}, 2),
        ({"engine": {"threads": 2, "generators": 3}, "learner": {"threads": 1, "workers": 2}}, 8),
        ({"cluster": {"gpus_per_generator": 1.0}}, 2),
        ({"cluster": {"address": "ray://head:10001"}}, None),
    ],
)
def test_with_cores_or_devices_of_their_own_both_run_at_once(settings: dict[str, object], cores: int | None) -> None:
    assert scheduling.plan(config(**settings), cores) == (config(**settings), "")


def test_two_fractions_of_one_gpu_take_turns() -> None:
    halves = {"cluster": {"gpus_per_generator": 0.5, "gpus_per_learner": 0.5}}
    planned, remark = scheduling.plan(config(**halves), None)
    assert planned.max_staleness == 0 and "cluster.gpus_per_learner" in remark


def test_a_run_that_takes_turns_is_left_alone() -> None:
    assert scheduling.plan(config(max_staleness=0), 1) == (config(max_staleness=0), "")
