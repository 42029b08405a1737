import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pyarrow as pa
import pytest

from srl_rlvr.records import RecordError
from srl_rlvr.reporting.report import ROLLOUT_VIEW, write_report

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}"


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, and the text of the data element."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_data = tag == "script" and dict(attrs).get("id") == "data"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data


Rendered = tuple[str, Page, dict[str, Any]]


@pytest.fixture
def render(tmp_path, config, result, metrics, rollouts) -> Callable[..., Rendered]:
    """Writes the page on a small made-up run, with what is changed of it; returns its text, tags and data."""

    def rendered(**changed: Any) -> Rendered:
        path = tmp_path / "report.html"
        run = {"config": config, "result": result, "metrics": metrics, "rollouts": rollouts}
        write_report(path, **{**run, **changed})
        text = path.read_text(encoding="utf-8")
        page = Page(text)
        return text, page, json.loads(page.data)

    return rendered


def close_to(value: float | None) -> Any:
    return None if value is None else pytest.approx(value, rel=1e-5)


def unpacked(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of ROLLOUT_VIEW again, from what the page holds."""
    view = data["rollouts"]
    strings, pieces = view["strings"], view["pieces"]
    return [
        {
            "stage": data["stages"][group["stage"]],
            "step": group["step"],
            "prompt_id": group["id"],
            "sample_index": sample["i"],
            "prompt": strings[group["prompt"]],
            "reference": strings[group["reference"]],
            "tokens": [pieces[index] for index in sample["tokens"]],
            "logprobs": pytest.approx([p / 1000 for p in sample["logprobs"]], abs=1e-3),
            "advantage": close_to(sample["advantage"]),
            "reward": close_to(sample["reward"]),
            "outcome": strings[sample["outcome"]],
            "components": strings[sample["components"]],
            "detail": strings[sample["detail"]],
            "finish_reason": strings[sample["finish"]],
        }
        for group in view["groups"]
        for sample in group["samples"]
    ]


def test_every_kept_rollout_is_in_the_page(render, rollouts) -> None:
    _, _, data = render()
    assert unpacked(data) == rollouts.to_pylist()


def test_the_page_loads_nothing_from_anywhere(render) -> None:
    text, page, _ = render()
    assert not re.search(r"https?://", text)
    assert "@import" not in text and "url(" not in text
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:,") == "data:,", tag
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in page.tags)


def test_hostile_text_stays_text(render, config, result, rollouts) -> None:
    _, plain, _ = render(notes=["x"])
    rows = rollouts.to_pylist()
    for column in ("stage", "prompt_id", "prompt", "reference", "outcome", "components", "detail", "finish_reason"):
        rows[0][column] = HOSTILE
    rows[0]["tokens"], rows[0]["logprobs"] = [HOSTILE, "\u2028", "<"], [-1.0, -1.0, -1.0]
    held_out = {"n": 200, HOSTILE: result["held_out"]["base"], **result["held_out"]}
    text, page, data = render(
        rollouts=pa.Table.from_pylist(rows, schema=ROLLOUT_VIEW),
        config={**config, "name": HOSTILE, "model": {"base": HOSTILE}},
        result={**result, "held_out": held_out, "model_type": HOSTILE},
        notes=[HOSTILE],
    )
    assert "<img" not in text
    assert text.count("<script") == 2
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert unpacked(data)[0]["tokens"] == [HOSTILE, "\u2028", "<"]


def test_the_script_never_builds_html_from_text(render) -> None:
    text, _, _ = render()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


def test_known_columns_are_drawn_and_unknown_ones_left_out(render) -> None:
    _, _, data = render()
    columns = data["metrics"]["columns"]
    assert "a_metric_nobody_knows" not in columns
    assert columns["reward"][:16] == [None] * 16, "the warm-up has no reward"
    titles = [chart["title"] for chart in data["charts"]]
    assert titles[:3] == ["Reward", "Pass rate", "Cross-entropy"]
    assert "Staleness" not in titles


def test_warm_up_and_policy_loss_are_apart(render) -> None:
    columns = render()[2]["metrics"]["columns"]
    assert [value is None for value in columns["cross_entropy"]] == [False] * 16 + [True] * 7
    assert [value is None for value in columns["policy_loss"]] == [True] * 16 + [False] * 7


def test_dpo_and_dev_have_curves_of_their_own(render, metrics) -> None:
    dpo = (
        metrics.slice(0, 16)
        .append_column("preferred", pa.array([0.5] * 16))
        .append_column("dev", pa.array([0.25] * 16))
    )
    data = render(metrics=pa.concat_tables([dpo, metrics.slice(16)], promote_options="default"))[2]
    columns = data["metrics"]["columns"]
    assert [value is None for value in columns["preference_loss"]] == [False] * 16 + [True] * 7
    assert set(columns["cross_entropy"]) == {None} and columns["dev"][0] == 0.25
    assert {"Dev", "Preferred", "Preference loss"} <= {chart["title"] for chart in data["charts"]}


def test_a_run_that_ended_before_its_first_update_has_a_page(render, result, metrics, rollouts) -> None:
    bare = {**result, "held_out": {"n": 200, "base": result["held_out"]["base"]}}
    text, _, data = render(metrics=metrics.slice(0, 0), rollouts=rollouts.slice(0, 0), result=bare)
    assert data["rollouts"]["groups"] == [] and data["charts"] == []
    assert "6.0 %" in text


def test_values_that_json_cannot_hold_become_gaps(render, metrics, rollouts) -> None:
    rows = rollouts.to_pylist()
    rows[0]["advantage"], rows[0]["logprobs"][0] = float("nan"), float("-inf")
    index = metrics.schema.get_field_index("grad_norm")
    infinite = metrics.set_column(index, "grad_norm", pa.array([float("inf")] * metrics.num_rows))
    _, _, data = render(metrics=infinite, rollouts=pa.Table.from_pylist(rows, schema=ROLLOUT_VIEW))
    sample = data["rollouts"]["groups"][0]["samples"][0]
    assert sample["advantage"] is None and sample["logprobs"][0] is None
    assert set(data["metrics"]["columns"]["grad_norm"]) == {None}
    assert "Gradient norm" not in [chart["title"] for chart in data["charts"]]


def test_tokens_and_logprobs_that_differ_in_number_are_named(render, rollouts) -> None:
    rows = rollouts.to_pylist()
    rows[0]["logprobs"] = [-1.0]
    with pytest.raises(RecordError, match=r"sample 0 has \d+ tokens and 1 logprobs"):
        render(rollouts=pa.Table.from_pylist(rows, schema=ROLLOUT_VIEW))


def test_a_long_run_stays_below_four_megabytes(render, long_run) -> None:
    metrics, rollouts = long_run
    text, _, _ = render(metrics=metrics, rollouts=rollouts)
    assert len(text.encode()) < 4e6
