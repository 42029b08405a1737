"""Files of images: what they become, and what is wrong with them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from srl_rlvr import model_types
from srl_rlvr.errors import InputError
from srl_rlvr.examples.files import Reading
from srl_rlvr.verifiers import find_verifier

TYPE = model_types.find("multimodal_vision")


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = picture("red"), picture("blue")


def load(folder: Path, *rows: dict[str, Any], how: Reading | None = None) -> list[dict[str, Any]]:
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "train.parquet")
    return TYPE.load(folder, "train", how or Reading()).to_pylist()


def _is_right(example: dict[str, Any]) -> bool:
    answer = "\n".join(example["steps"])
    found = find_verifier(example["verifier"])(answer, example["reference"], json.loads(example["metadata"]))
    return found.reward == 1


def test_a_question_is_taken_as_it_is(tmp_path: Path) -> None:
    [row] = load(tmp_path, {"image": RED, "question": "Which colour?", "answer": "red", "steps": ["It is all red."]})
    assert (row["images"], row["prompt"]) == ([RED], "Which colour?")
    assert row["steps"] == ["It is all red.", "Answer: red"]
    assert _is_right(row)


def test_a_number_is_an_answer_in_all_its_digits(tmp_path: Path) -> None:
    rows = load(tmp_path, *({"image": RED, "question": f"{n}?", "answer": n} for n in (12345678.0, 1234567.25, 3.0)))
    assert [row["reference"] for row in rows] == ["12345678", "1234567.25", "3"]


def test_the_labels_of_the_train_file_are_the_choice(tmp_path: Path) -> None:
    first, second = load(tmp_path, {"image": RED, "label": "hat"}, {"image": BLUE, "label": "coat"})
    assert first["prompt"] == second["prompt"] == "Which of these is shown: coat, hat?"
    assert (first["reference"], second["reference"]) == ("hat", "coat")
    assert _is_right(first)


def test_a_label_that_no_train_row_has_is_an_error(tmp_path: Path) -> None:
    load(tmp_path, {"image": RED, "label": "hat"})
    pq.write_table(pa.Table.from_pylist([{"image": RED, "label": "boat"}]), tmp_path / "dev.parquet")
    with pytest.raises(InputError, match=r"dev.parquet, row 1: label 'boat' is none of those in training: hat"):
        TYPE.load(tmp_path, "dev")


def test_a_model_is_asked_about_the_labels_that_it_was_trained_on(tmp_path: Path) -> None:
    load(tmp_path, {"image": RED, "label": "hat"}, {"image": BLUE, "label": "coat"})
    card = TYPE.card([tmp_path], [])
    [row] = load(tmp_path, {"image": RED, "label": "hat"}, how=Reading(card=card))
    assert row["prompt"] == "Which of these is shown: coat, hat?"


def test_the_card_is_of_rows_that_are_right(tmp_path: Path) -> None:
    rows = [{"image": b"x", "label": ""}, {"image": RED, "label": "hat"}, {"image": BLUE, "label": "coat"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert TYPE.card([tmp_path], [])["metadata"] == {"labels": ["coat", "hat"]}


def test_counts_are_an_object_a_number_a_line(tmp_path: Path) -> None:
    [row] = load(tmp_path, {"image": RED, "n_rbc": 18, "n_wbc": 0, "boxes": "[]"})
    assert row["steps"] == ['{"rbc": 18,', '"wbc": 0}']
    assert "rbc, wbc" in row["prompt"] and _is_right(row)


def test_what_the_train_file_counts_is_counted_in_every_row(tmp_path: Path) -> None:
    image = "data:image/png;base64," + base64.b64encode(RED).decode()
    rows = [{"image": image, "n_cats": 1}, {"image": image, "n_cats": 1, "n_dogs": 2}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"train.jsonl, row 1: column 'n_dogs' should be a number of things"):
        TYPE.load(tmp_path, "train")
    [row] = TYPE.load(tmp_path, "train", Reading(skip_bad=True)).to_pylist()
    assert row["steps"] == ['{"cats": 1,', '"dogs": 2}']


def test_a_statement_has_a_line_for_each_box(tmp_path: Path) -> None:
    things = [{"type": "square", "color": "#0099ff"}, {"type": "square", "color": "#0099ff"},
              {"type": "circle", "color": "Black"}]  # fmt: skip
    row = {"image": RED, "sentence": "There is a circle.", "label": True, "n_objects": 4}
    [row] = load(tmp_path, row | {"structured_rep": json.dumps([things, [things[2]]])})
    assert row["steps"] == ["1: 1 black circle, 2 blue square", "2: 1 black circle", "Answer: true"]
    assert _is_right(row)


def test_characters_stand_beside_the_same_and_beside_another_in_turn(tmp_path: Path) -> None:
    rows = [{"id": str(i), "image": picture(f"#0000{i:02x}"), "alphabet": "a", "character": "xy"[i < 2]}
            for i in range(4)]  # fmt: skip
    found = load(tmp_path, *rows)
    characters = {row["image"]: row["character"] for row in rows}
    for example in found:
        first, second = (characters[image] for image in example["images"])
        assert example["reference"] == ("yes" if first == second else "no")
        assert example["steps"] == [f"1: {first}", f"2: {second}", f"Answer: {example['reference']}"]
        assert _is_right(example)
    assert [example["reference"] for example in found] == ["no", "yes", "no", "yes"]
    assert found == load(tmp_path, *rows)


def test_no_row_stands_beside_one_without_a_character(tmp_path: Path) -> None:
    shown = {"image": RED, "alphabet": "a"}
    rows = [shown | {"character": "x"}, shown | {"character": "x"}, shown | {"character": None}]
    with pytest.raises(InputError, match="row 1: no other row of its alphabet to show beside 'x'"):
        load(tmp_path, *rows)
    found = load(tmp_path, *rows, how=Reading(skip_bad=True))
    assert [row["steps"] for row in found] == [["1: x", "2: x", "Answer: yes"]]


def test_json_lines_name_images_by_path_or_hold_them(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    address = "data:image/png;base64," + base64.b64encode(BLUE).decode()
    rows = [{"images": ["red.png", address], "question": "Same?", "answer": "no"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [row] = TYPE.load(tmp_path / "mine.jsonl", "train").to_pylist()
    assert row["images"] == [RED, BLUE]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?", "answer": "a"}, "column 'image' is missing"),
        ({"image": b"x", "question": "?", "answer": "a"}, "the image is no image that can be read"),
        ({"image": "gone.png", "question": "?", "answer": "a"}, r"the image gone.png cannot be read \(No such file"),
        ({"image": "data:image/png;base64,?", "question": "?", "answer": "a"}, "is not valid base64"),
        ({"image": RED, "question": "?"}, "column 'answer' is missing; it has image, question"),
        ({"image": RED, "question": "?" * 100_001, "answer": "a"}, "'question' has 100,001 characters; it should"),
        ({"image": RED, "sentence": "a", "label": "true"}, "column 'label' should be true or false"),
        ({"image": RED, "sentence": "a", "label": True, "structured_rep": "[1]"}, "column 'structured_rep' should be"),
        ({"image": RED, "n_cells": -1}, "column 'n_cells' should be a number of things"),
        ({"image": RED, "character": "x"}, "no other row of its alphabet to show beside 'x'"),
        ({"image": RED}, "beside 'image' there should be"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"train.parquet, row 1: .*{said}"):
        load(tmp_path, row)


def test_wrong_rows_are_left_out_and_counted_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"image": image, "label": "hat"} for image in (RED, b"x", b"y", BLUE)]
    assert len(load(tmp_path, *rows, how=Reading(skip_bad=True))) == 2
    assert "wrong rows left out: 2; the first: " in caplog.text


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="train.parquet: not a whole Parquet file"):
        TYPE.load(tmp_path, "train")


def test_images_alone_are_asked_what_the_card_says(tmp_path: Path) -> None:
    load(tmp_path, {"image": RED, "label": "hat"}, {"image": BLUE, "label": "coat"})
    card = TYPE.card([tmp_path], [])
    (tmp_path / "new").mkdir()
    [row] = load(tmp_path / "new", {"image": RED}, how=Reading(unanswered=True, card=card))
    assert row["prompt"] == "Which of these is shown: coat, hat?"
    with pytest.raises(InputError, match="it has no 'question', and the model's card names none"):
        load(tmp_path / "new", {"image": RED}, how=Reading(unanswered=True))


def test_labels_may_be_numbers(tmp_path: Path) -> None:
    for labels in ([0, 1, 2], [0.0, 1.0, 2.0]):
        shown = map(picture, ("red", "green", "blue"))
        rows = [{"image": image, "label": label} for image, label in zip(shown, labels, strict=True)]
        examples = load(tmp_path, *rows)
        assert [example["reference"] for example in examples] == ["0", "1", "2"]
        assert "0, 1, 2" in examples[0]["prompt"]


def test_for_prediction_a_statement_is_a_question(tmp_path: Path) -> None:
    row = {"image": picture("red"), "sentence": "It is red."}
    [example] = load(tmp_path, row, how=Reading(unanswered=True, card={}))
    assert example["prompt"] == "It is red.\nIs that true or false?"
