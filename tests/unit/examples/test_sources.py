"""What a run trains on, looks at and is judged by, kept apart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from srl_rlvr.config import SourceConfig
from srl_rlvr.errors import InputError
from srl_rlvr.examples.sources import load_all


def ids(table: pa.Table) -> list[str]:
    return table["id"].to_pylist()


def user_file(folder: Path, count: int) -> str:
    path = folder / "mine.jsonl"
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_generated_problems_fall_into_three_parts_without_a_common_id() -> None:
    train, dev, held_out = load_all([SourceConfig(family="sums", train=30, dev=20, held_out=10)], 0)
    assert (train.num_rows, dev.num_rows, held_out.num_rows) == (30, 20, 10)
    assert len({*ids(train), *ids(dev), *ids(held_out)}) == 60
    assert ids(load_all([SourceConfig(family="sums", train=30, held_out=10)], 0)[2]) == ids(held_out)


def test_what_is_set_apart_is_drawn_and_the_order_of_the_file_stays(tmp_path: Path) -> None:
    path = user_file(tmp_path, 200)
    source = SourceConfig(path=path, dev=40, held_out=40)
    parts = load_all([source], 0)
    numbers = [[int(prompt.split()[0]) for prompt in part["prompt"].to_pylist()] for part in parts]
    assert [len(part) for part in numbers] == [120, 40, 40] and numbers == [sorted(part) for part in numbers]
    assert all(60 < sum(part) / len(part) < 140 for part in numbers)
    assert [ids(part) for part in load_all([source], 1)] == [ids(part) for part in parts]
    fewer, _, held_out = load_all([source.model_copy(update={"train": 30})], 0)
    assert set(ids(fewer)) < set(ids(parts[0])) and ids(held_out) == ids(parts[2])
    more = load_all([source.model_copy(update={"held_out": 41})], 0)[2]
    assert set(ids(held_out)) < set(ids(more))


def test_of_a_file_sorted_by_label_every_label_is_trained_held_out_and_calibrated_on(tmp_path: Path) -> None:
    names = ["a", "b", "c", "oos"]
    for split in ("train", "dev"):
        rows = [{"text": f"{split} {name} {n}", "label": name} for name in names for n in range(30)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(tmp_path), train=30, dev=20, held_out=40)
    train, dev, held_out = (
        Counter(prompt.split()[1] for prompt in part["prompt"].to_pylist())
        for part in load_all([source], 0, "intent_router")
    )
    assert set(train) == {"a", "b", "c"} and set(dev) == set(held_out) == set(names)
    assert train.total() == 30 and held_out.total() == 40 and dev["oos"] == 30 and 10 < dev.total() - 30 < 20


def test_dev_is_asked_with_candidates_of_its_own_number(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"query": f"q{n}", "candidates": [f"{n} {c}" for c in range(9)], "labels": [0] * 8 + [1]} for n in range(40)
    ]
    rows.insert(3, {"query": "wrong"})
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(tmp_path / "mine.jsonl"), dev=10, held_out=5, candidates=2, skip_bad=True)
    as_trained = load_all([source], 0, "reranker")
    parts = load_all([source.model_copy(update={"dev_candidates": 6})], 0, "reranker")
    assert [set(map(len, part["candidates"].to_pylist())) for part in parts] == [{2}, {6}, {9}]
    assert [part["prompt"].to_pylist() for part in parts] == [part["prompt"].to_pylist() for part in as_trained]
    for asked in parts[1].to_pylist():
        [(number, _)] = json.loads(asked["reference"]).items()
        assert asked["candidates"][int(number)].endswith(" 8")


def test_a_question_is_in_one_split_whatever_its_candidates(tmp_path: Path) -> None:
    def rows(*names: str) -> str:
        asked = [
            {"query": name, "candidates": [f"{name} {n}", "other"], "labels": [1, 0]} for name in names for n in (1, 2)
        ]
        return "".join(json.dumps(row) + "\n" for row in asked)

    (tmp_path / "train.jsonl").write_text(rows(*(f"q{n}" for n in range(30))))
    (tmp_path / "dev.jsonl").write_text(rows("q1", "q2 ", "q99"))
    parts = load_all([SourceConfig(path=str(tmp_path), dev=10, dev_candidates=2)], 0, "reranker")
    train, dev, held_out = ({prompt.strip() for prompt in part["prompt"].to_pylist()} for part in parts)
    assert held_out == {"q1", "q2", "q99"} and not train & dev and not (train | dev) & held_out
    assert len(train | dev) == 28 and parts[0].num_rows > len(train)  # both rows of a question stay


def test_what_may_be_answered_is_known_of_the_train_file(tmp_path: Path) -> None:
    for name, labels in (("mine", "abc"), ("judged", "bc")):
        rows = [{"text": f"{name} {label} {n}", "label": label} for label in labels for n in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "labels.jsonl").write_text('{"label": "a", "description": "the first"}\n')
    source = SourceConfig(path=str(tmp_path / "mine.jsonl"), held_out_path=str(tmp_path / "judged.jsonl"))
    train, _, held_out = load_all([source], 0, "intent_router")
    assert {*map(tuple, train["candidates"].to_pylist())} == {*map(tuple, held_out["candidates"].to_pylist())}
    assert held_out["candidates"][0].as_py() == ["the first", "b", "c"]


def test_two_sources_that_share_problems_hold_back_what_either_holds_back(tmp_path: Path) -> None:
    path = user_file(tmp_path, 10)
    sources = [SourceConfig(path=path, dev=3, held_out=2), SourceConfig(path=path, held_out=1)]
    parts = load_all(sources, 0)
    found = [example_id for part in parts for example_id in ids(part)]
    assert len(found) == len(set(found)) == 10
    assert [part.num_rows for part in parts] == [5, 3, 2]


@pytest.mark.parametrize(("key", "value"), [("dev", 8), ("held_out", 10)])
def test_a_file_of_which_nothing_is_left_to_train_on_is_refused(tmp_path: Path, key: str, value: int) -> None:
    source = SourceConfig.model_validate({"path": user_file(tmp_path, 10), "held_out": 2} | {key: value})
    with pytest.raises(InputError, match=f"problems, and data.{key} is {value}: lower it"):
        load_all([source], 0)


def test_all_sources_of_a_run_ask_for_the_same_labels_and_fields_as_its_model_will(tmp_path: Path) -> None:
    for name, labels in (("bank", ("card", "pay")), ("travel", ("fly", "hotel"))):
        rows = [{"text": f"{label} {n}", "label": label} for label in labels for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    several = [SourceConfig(path=str(tmp_path / f"{name}.jsonl"), held_out=2, dev=1) for name in ("bank", "travel")]
    for part in load_all(several, 0, "intent_router"):
        assert {tuple(row["candidates"]) for row in part.to_pylist()} == {("card", "pay", "fly", "hotel")}
        assert all(row["candidates"][int(row["steps"][0])] == row["prompt"].split()[0] for row in part.to_pylist())

    for name, field in (("one", "city"), ("two", "person")):
        rows = [{"text": f"Ada {n}", "target": {field: "Ada"}} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    several = [SourceConfig(path=str(tmp_path / f"{name}.jsonl"), held_out=1) for name in ("one", "two")]
    train, _, held_out = load_all(several, 0, "extractor")
    assert {json.loads(row["metadata"])["schema"]["properties"].keys() == {"city", "person"}
            for row in train.to_pylist() + held_out.to_pylist()} == {True}  # fmt: skip


def test_a_question_with_different_answers_in_two_files_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, answer in (("train", 4), ("dev", 5)):
        rows = [{"question": "2 + 2?", "answer": answer}, {"question": f"{name}?", "answer": 1}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_all([SourceConfig(path=str(tmp_path), held_out=2)], 0)
    assert "different answers in train.jsonl row 1 and dev.jsonl row 1" in caplog.text


def test_a_runs_own_verifiers_reach_its_files(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": 1, "verifier": "checks:right"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), held_out=1)
    with pytest.raises(InputError, match=r"row 1: verifier 'checks:right' is not declared"):
        load_all([source], 0)
    assert load_all([source], 0, verifiers=["checks:right"])[0]["verifier"].to_pylist() == ["checks:right"] * 2
