"""What a run trains on, looks at and is judged by, kept apart."""

from __future__ import annotations

import json
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


def test_dev_problems_of_a_file_stand_before_the_held_out_ones(tmp_path: Path) -> None:
    path = user_file(tmp_path, 10)
    train, dev, held_out = load_all([SourceConfig(path=path, dev=3, held_out=2)], 0)
    whole = ids(load_all([SourceConfig(path=path, held_out=1)], 0)[0])
    assert ids(train) == whole[:5] and ids(dev) == whole[5:8] and ids(held_out)[0] == whole[8]


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
