from __future__ import annotations

from typing import Any

import pytest

from srl_rlvr.reporting.alarms import Watch, without_update

HEALTHY = {
    "stage": "rlvr", "reward": 0.3, "scored_reward": 0.3, "pass_rate": 0.3, "entropy": 0.8, "completion_tokens": 40.0,
    "truncated": 0.1, "divergence": 1e-6, "staleness": 0.0, "kl": 0.01,
    "loss": 0.1,
}  # fmt: skip


def rows(count: int, stage: str = "rlvr", **curves: Any) -> list[dict[str, Any]]:
    """`count` updates; each curve is a function of the step."""
    return [
        HEALTHY | {"stage": stage, "step": step} | {name: curve(step) for name, curve in curves.items()}
        for step in range(count)
    ]


def idle(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same steps, none of which made an update."""
    return [{k: v for k, v in row.items() if k not in ("loss", "entropy", "kl", "divergence")} for row in given]


def raised(given: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return [(alarm.name, alarm.stage, alarm.step) for alarm in Watch(given).alarms]


def test_a_healthy_run_raises_nothing() -> None:
    curves: dict[str, Any] = dict.fromkeys(("reward", "scored_reward", "pass_rate"), lambda s: s / 30)
    curves |= {"entropy": lambda s: 0.9 - s / 50, "completion_tokens": lambda s: 40.0 + s, "kl": lambda s: s / 100}
    assert raised(rows(30, **curves)) == []


@pytest.mark.parametrize(
    "name, curves, step",
    [
        ("entropy collapse", {"entropy": lambda s: 0.8 if s < 9 else 0.01}, 10),
        ("length explosion", {"completion_tokens": lambda s: 40.0 if s < 9 else 100.0}, 10),
        ("length explosion", {"truncated": lambda s: 0.1 if s < 9 else 0.95}, 10),
        (
            "reward hacking of the format",
            {"reward": lambda s: -0.5 if s < 9 else 0.1, "scored_reward": lambda s: 0.3 if s < 9 else 0.1},
            10,
        ),
        ("engine and learner diverge", {"divergence": lambda s: 0.2 if s == 4 else 1e-6}, 4),
        ("KL runaway", {"kl": lambda s: 0.9 if s >= 4 else 0.0}, 5),
    ],
)
def test_what_goes_wrong_is_named_once_with_its_step(name: str, curves: dict[str, Any], step: int) -> None:
    assert raised(rows(20, **curves)) == [(name, "rlvr", step)]


def test_a_solved_stage_may_be_sure_of_itself() -> None:
    assert raised(rows(20, entropy=lambda s: 0.8 if s < 9 else 0.001, pass_rate=lambda s: 0.99)) == []


def test_staleness_explains_some_divergence() -> None:
    assert raised(rows(8, divergence=lambda s: 0.08, staleness=lambda s: 1.0)) == []
    assert raised(rows(8, divergence=lambda s: 0.08)) != []


def test_stages_are_judged_by_themselves() -> None:
    both = rows(6, "srl", entropy=lambda s: 0.9) + rows(6, entropy=lambda s: 0.015)
    assert raised(both) == []
    twice = rows(8, "srl", divergence=lambda s: 0.2) + rows(8, divergence=lambda s: 0.2)
    assert [stage for _, stage, _ in raised(twice)] == ["srl", "rlvr"]


def test_a_warm_up_and_steps_without_an_update_are_passed() -> None:
    warm_up = [{"stage": "sft", "step": s, "loss": 1.0} for s in range(8)]
    assert raised(warm_up + idle(rows(4)) + rows(8)[4:5] + idle(rows(8))[5:]) == []


def test_a_run_that_goes_on_does_not_say_it_again() -> None:
    whole = rows(12, divergence=lambda s: 0.2)
    watch = Watch(whole[:6])
    assert [alarm for row in whole[6:] for alarm in watch.look(row)] == []


def test_an_alarm_is_one_line_with_stage_step_numbers_and_what_to_do() -> None:
    (alarm,) = Watch(rows(12, entropy=lambda s: 0.8 if s < 6 else 0.01)).alarms
    assert str(alarm) == (
        "rlvr, step 8: entropy collapse: entropy fell from 0.800 to 0.010 nats a token with 30% of samples right; "
        "lower the learning rate, or set kl"
    )


def test_answers_that_are_cut_off_from_the_start_are_named_at_once_with_the_key() -> None:
    (alarm,) = Watch(rows(3, truncated=lambda s: 1.0)).alarms
    assert (alarm.name, alarm.step) == ("answers are cut off", 1) and "stages.rlvr.max_tokens" in alarm.detail
    assert raised(rows(8, truncated=lambda s: 0.89 - s / 20)) == []


def test_a_preference_stage_whose_answers_are_cut_off_is_named_too() -> None:
    kept = ("stage", "step", "pass_rate", "completion_tokens", "truncated", "loss")
    preferred = [{name: row[name] for name in kept} for row in rows(3, "dpo", truncated=lambda s: 1.0)]
    assert raised(preferred) == [("answers are cut off", "dpo", 1)]


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"truncated": 1.0}, "stages.rlvr.max_tokens"),
        ({"pass_rate": 1.0}, "solved"),
        ({"failed": 9.0, "scored": 1.0}, "verifications failed"),
        ({}, "temperature"),
    ],
)
def test_steps_without_an_update_are_named_with_their_cause(row: dict[str, float], key: str) -> None:
    given = rows(2) + [each | row for each in idle(rows(8))[2:]]
    (alarm,) = [alarm for alarm in Watch(given).alarms if alarm.name == "no update"]
    assert alarm.step == 6 and key in alarm.detail


def test_a_stage_without_any_update_is_named_at_the_end() -> None:
    given = [{"stage": "sft", "step": 0, "loss": 1.0}, *idle(rows(2, "srl")), *rows(2)]
    (line,) = without_update(given)
    assert line.startswith("srl made no update in 2 steps")
    assert without_update(rows(2)) == without_update([]) == []
