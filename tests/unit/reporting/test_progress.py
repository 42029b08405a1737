import io

import pytest

from srl_rlvr.reporting.progress import Progress, duration


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


METRICS = {"reward": 0.614, "pass_rate": 0.338, "tokens_per_s": 173.2, "loss": 0.01}


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_plain_output_is_one_line_a_step(clock) -> None:
    stream = io.StringIO()
    with Progress([("srl", 40)], stream=stream, clock=clock) as progress:
        progress.stage("srl", "srl", 40)
        clock.now_s += 4.1
        progress.step(11, METRICS)
    assert stream.getvalue() == "srl   12/40  reward 0.61  pass 0.34  173 tok/s  4.1 s/step  left 2 min\n"


def test_time_left_covers_the_stages_to_come(clock) -> None:
    stream = io.StringIO()
    with Progress([("sft", 10), ("srl", 100), ("rlvr", 350)], stream=stream, clock=clock) as progress:
        progress.stage("srl", "srl", 100)
        for step in range(50, 53):
            clock.now_s += 600 if step == 51 else 9  # the median forgets one slow step
            progress.step(step, METRICS)
    assert stream.getvalue().splitlines()[-1].endswith("left 1 h 0 min")


def test_a_warm_up_shows_its_loss(clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream, clock=clock) as progress:
        progress.stage("sft", "sft", 4)
        clock.now_s += 2
        progress.step(3, {"loss": 1.234, "reward": None})
    assert stream.getvalue() == "sft   4/4  loss 1.23  2.0 s/step  left 0 s\n"


def test_phases_do_not_flood_a_log_file(clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream, clock=clock) as progress:
        progress.phase("starting engine")
        for done in range(100):
            clock.now_s += 1
            progress.phase(f"evaluating base {done}/100")
    assert stream.getvalue().splitlines() == [
        "starting engine",
        "evaluating base 0/100",
        "evaluating base 30/100",
        "evaluating base 60/100",
        "evaluating base 90/100",
    ]


def test_notes_are_printed_as_they_are() -> None:
    stream = io.StringIO()
    note = "[bold]MLflow[/] does not answer: " + "x" * 300
    with Progress(stream=stream) as progress:
        progress.note(note)
    assert stream.getvalue() == note + "\n"


def test_a_terminal_keeps_one_line_of_each_stage(clock, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    with Progress(stream=stream, clock=clock) as progress:
        progress.stage("srl", "srl", 2)
        for step in range(2):
            clock.now_s += 1
            progress.step(step, METRICS)
        progress.phase("evaluating srl 1/100")
    text = stream.getvalue()
    assert "srl   2/2  reward 0.61" in text
    assert "\x1b[3" not in text, "NO_COLOR is honored"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59, "59 s"), (61, "1 min"), (3590, "1 h 0 min"), (12000, "3 h 20 min")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
