import json

import pytest

from srl_rlvr.errors import InputError
from srl_rlvr.reporting.result import Interval, interval, table, write_result


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_intervals_agree_with_published_ones(successes: int, n: int, low: float, high: float) -> None:
    found = interval(successes, n)
    assert found.score == successes / n
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(InputError, match="held-out set"):
        interval(successes, n)


def test_result_json_has_the_fixed_shape(tmp_path) -> None:
    path = tmp_path / "run" / "result.json"
    held_out = {"base": Interval(0.1, 0.05, 0.2), "srl": Interval(0.3, 0.2, 0.4)}
    returned = write_result(path, "task_llm", held_out, 100, 12.5, 4.2, 12345)
    assert json.loads(path.read_text()) == returned
    assert returned == {
        "model_type": "task_llm",
        "held_out": {
            "n": 100,
            "base": {"score": 0.1, "low": 0.05, "high": 0.2},
            "srl": {"score": 0.3, "low": 0.2, "high": 0.4},
        },
        "minutes": 12.5,
        "peak_memory_gib": 4.2,
        "sampled_tokens": 12345,
    }
    assert list(path.parent.iterdir()) == [path], "no temporary file stays behind"


def test_table_shows_each_gain_over_the_row_before() -> None:
    held_out = {"base": interval(6, 100), "sft": interval(20, 100), "rlvr-long": interval(18, 100)}
    assert table(held_out, 100).splitlines() == [
        "model      pass rate  95 % interval      gain   (100 held-out problems)",
        "base            6.0%  2.8% to 12.5%",
        "sft            20.0%  13.3% to 28.9%    +14.0",
        "rlvr-long      18.0%  11.7% to 26.7%     -2.0",
    ]
