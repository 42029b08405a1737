from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from srl_rlvr import records
from srl_rlvr.records import RecordError

ROLLOUT = {
    "prompt_id": "p",
    "sample_index": 0,
    "policy_version": 3,
    "token_ids": [1, 2],
    "logprobs": [-0.5, -0.25],
    "text": "ab",
    "finish_reason": "stop",
}


def rollouts(*changes: dict[str, Any]) -> pa.Table:
    return records.build("Rollout", [ROLLOUT | change for change in changes])


def test_a_row_is_read_back_as_it_was_built() -> None:
    assert rollouts({}).to_pylist() == [ROLLOUT]


@pytest.mark.parametrize("record", records.SCHEMAS)
def test_an_empty_table_is_a_valid_record(record: str) -> None:
    assert records.check(record, records.build(record, [])).num_rows == 0
    assert records.concat(record, []).schema == records.SCHEMAS[record]


@pytest.mark.parametrize("record", records.SCHEMAS)
def test_a_missing_column_is_named_with_its_type(record: str) -> None:
    column = records.SCHEMAS[record].names[-1]
    table = records.SCHEMAS[record].empty_table().drop_columns([column])
    with pytest.raises(RecordError, match=f"^{record} table: column '{column}' is missing; it should be "):
        records.check(record, table)


def test_an_unknown_column_is_named() -> None:
    table = rollouts({}).append_column("extra", pa.array([1]))
    with pytest.raises(RecordError, match="^Rollout table: column 'extra' is not part of the record$"):
        records.check("Rollout", table)


def test_a_column_of_another_type_is_named_with_both_types() -> None:
    table = rollouts({}).set_column(1, "sample_index", pa.array([0], pa.int64()))
    with pytest.raises(RecordError, match="^Rollout table: column 'sample_index' is int64; it should be int32$"):
        records.check("Rollout", table)


def test_nulls_are_refused() -> None:
    with pytest.raises(RecordError, match="^Rollout table: column 'text' has 1 nulls$"):
        rollouts({}, {"text": None})


@pytest.mark.parametrize(("column", "value"), [("token_ids", [1, None]), ("logprobs", [-0.5, None])])
def test_nulls_within_a_list_are_refused(column: str, value: list[Any]) -> None:
    with pytest.raises(RecordError, match=f"^Rollout table: column '{column}' has nulls within its lists$"):
        rollouts({}, {column: value})


def test_a_row_without_a_column_is_refused_by_name() -> None:
    row = {name: value for name, value in ROLLOUT.items() if name != "logprobs"}
    with pytest.raises(RecordError, match="^Rollout table: column 'logprobs' is missing$"):
        records.build("Rollout", [ROLLOUT, row])


def test_a_row_with_a_column_too_many_is_refused_by_name() -> None:
    with pytest.raises(RecordError, match="^Rollout table: column 'reward' is not part of the record$"):
        rollouts({}, {"reward": 1.0})


@pytest.mark.parametrize("value", ["many", [1, "x"], [2**40], [2**70]])
def test_a_value_of_another_type_names_its_column_in_one_line(value: Any) -> None:
    with pytest.raises(RecordError, match=r"^Rollout table: column 'token_ids' is not list<.*int32>: .") as caught:
        rollouts({"token_ids": value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "first", "second"),
    [("Rollout", "token_ids", "logprobs"), ("Sample", "completion_ids", "behavior_logprobs")],
)
def test_lengths_that_must_agree_are_named_with_the_row(record: str, first: str, second: str) -> None:
    blank = {field.name: "" if field.type == pa.string() else 0 for field in records.SCHEMAS[record]}
    blank |= {field.name: [] for field in records.SCHEMAS[record] if pa.types.is_list(field.type)}
    rows = [blank, blank | {first: [1, 2, 3], second: [0.5]}]
    with pytest.raises(RecordError, match=f"^{record} table: row 1 has 3 {first} and 1 {second}$"):
        records.build(record, rows)


def test_a_slice_is_checked_by_its_own_rows() -> None:
    good, bad = rollouts({}, {}), rollouts({}, {})
    bad = bad.set_column(4, "logprobs", pa.array([[-1.0, -1.0], [-1.0]], pa.list_(pa.float32())))
    table = pa.concat_tables([good, bad.cast(good.schema)])
    assert records.check("Rollout", table.slice(1, 2)).num_rows == 2
    with pytest.raises(RecordError, match="row 1 has 2 token_ids and 1 logprobs"):
        records.check("Rollout", table.slice(2, 2))


def test_tables_are_joined_in_order_and_checked() -> None:
    joined = records.concat("Rollout", [rollouts({"text": "a"}), rollouts({"text": "b"}, {"text": "c"}).slice(1)])
    assert joined["text"].to_pylist() == ["a", "c"]
    with pytest.raises(RecordError):
        records.concat("Verdict", [rollouts({})])


def test_a_problem_has_one_id_however_its_white_space_falls() -> None:
    assert records.example_id("task_llm", "1 +  1\n") == records.example_id("task_llm", " 1 + 1")


def test_problems_that_differ_have_different_ids() -> None:
    asked = [
        records.example_id("task_llm", "1 + 1"),
        records.example_id("task_llm", "1 + 2"),
        records.example_id("reranker", "1 + 1"),
        records.example_id("task_llm", "1 + 1", images=[b"picture"]),
        records.example_id("task_llm", "1 + 1", candidates=["2"]),
    ]
    assert len(set(asked)) == len(asked)


def test_an_example_is_a_valid_row_with_json_beside_it() -> None:
    row = records.example(
        model_type="task_llm", task="sums", prompt="1 + 1", steps=["1 + 1 = 2"], reference="2", verifier="number",
        metadata={"b": 1, "a": 2}, provenance={"file": "x"},
    )  # fmt: skip
    assert records.build("Example", [row]).num_rows == 1
    assert row["metadata"] == '{"a": 2, "b": 1}' and row["id"] == records.example_id("task_llm", "1 + 1")
