"""Files for the parser and the extractor: what they become, and what is wrong with them."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from srl_rlvr import model_types
from srl_rlvr.errors import InputError
from srl_rlvr.examples import structures
from srl_rlvr.examples.files import Reading, Split
from srl_rlvr.examples.structures import as_lines
from srl_rlvr.verifiers import find_verifier

TOKENS = ["She", "likes", "to", "sing", "here", "today"]
FRAMES = [
    {"index": 3, "predicate": "sing", "args": [
        {"role": "ARGM-LOC", "start": 4, "end": 5}, {"role": "ARGM-LOC", "start": 5, "end": 6}]},
    {"index": 1, "predicate": "likes", "args": [
        {"role": "ARG1", "start": 2, "end": 6}, {"role": "ARG0", "start": 0, "end": 1}]},
]  # fmt: skip
SENTENCE = {"tokens": TOKENS, "frames": FRAMES}
RECEIPT = {"text": "ACME\n3 May\ntotal 4.50", "target": {"total": "4.50", "company": "ACME", "tax": None}}
NEWS = {
    "tokens": ["Ada", "met", "Bob", "in", "Oslo"],
    "entities": [
        {"type": "place", "start": 4, "text": "Oslo"},
        {"type": "person", "start": 0, "text": "Ada"},
        {"type": "person", "start": 2, "text": "Bob"},
    ],
}


def load(folder: Path, model_type: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model_types.find(model_type).load(folder / "mine.jsonl", "train").to_pylist()


def test_frames_stand_in_the_order_of_the_sentence_and_roles_too(tmp_path: Path) -> None:
    [example] = load(tmp_path, "srl_parser", SENTENCE)
    assert example["prompt"] == "She likes to sing here today"
    assert json.loads("\n".join(example["steps"])) == [
        {"predicate": "likes", "ARG0": "She", "ARG1": "to sing here today"},
        {"predicate": "sing", "ARGM-LOC": ["here", "today"]},
    ]
    assert len(example["steps"]) == 2


def test_fields_stand_in_the_order_of_the_text_under_their_schema(tmp_path: Path) -> None:
    [example] = load(tmp_path, "extractor", RECEIPT)
    assert example["steps"] == ['{"company": "ACME",', '"total": "4.50"}']
    assert example["prompt"].startswith('{"company": "string", "tax": "string", "total": "string"}\nACME')


def test_entities_of_one_type_are_one_field(tmp_path: Path) -> None:
    [example] = load(tmp_path, "extractor", NEWS)
    assert example["steps"] == ['{"person": ["Ada", "Bob"],', '"place": ["Oslo"]}']
    slots = {"text": "for two", "slots": [{"slot": "people", "start": 4, "end": 7, "text": "two"}]}
    assert load(tmp_path, "extractor", slots)[0]["steps"] == ['{"people": ["two"]}']


def test_a_row_may_bring_its_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "number"}, "who": {"type": "array"}}}
    [example] = load(tmp_path, "extractor", {"text": "7 men", "target": {"n": 7}, "schema": schema})
    assert example["prompt"].startswith('{"n": "number", "who": ["string"]}')
    assert example["steps"] == ['{"n": 7}']


def test_true_and_false_are_schemas_of_fields(tmp_path: Path) -> None:
    from srl_rlvr.verifiers.structures import fields

    schema = {"properties": {"n": True, "no": False, "all": {"type": "array", "items": True}}}
    [example] = load(tmp_path, "extractor", {"text": "7 men", "target": {"n": 7}, "schema": schema})
    assert example["steps"] == ['{"n": 7}'] and example["prompt"].startswith('{"n": "string", "no": "string"')
    scored = [fields(answer, '{"n": 7}', json.loads(example["metadata"])) for answer in ('{"n": 7}', '{"no": 1}')]
    assert scored[0].reward == 1 and not scored[1].components["valid"]


class Party(BaseModel):
    name: str
    part_of: Party | None = None


class Bill(BaseModel):
    total: float | None
    kind: Literal["bill", "offer"]
    seller: Party
    buyer: Party | None = None
    lines: list[Party]
    due: datetime.date | None = None
    paid: bool


def test_the_schema_of_a_pydantic_model_is_shown_whole(tmp_path: Path) -> None:
    target = {"total": 5, "kind": "bill", "seller": {"name": "ACME"}, "lines": [], "paid": True}
    row = {"text": "ACME total 5", "target": target, "schema": Bill.model_json_schema()}
    [example] = load(tmp_path, "extractor", row)
    party = {"name": "string", "part_of": ["object", "null"]}
    assert json.loads(example["prompt"].splitlines()[0]) == {
        "total": ["number", "null"],
        "kind": {"enum": ["bill", "offer"]},
        "seller": party,
        "buyer": [party, "null"],
        "lines": [party],
        "due": ["string", "null"],
        "paid": "boolean",
    }


def test_references_do_not_make_a_prompt_endless(tmp_path: Path) -> None:
    number_of = {f"d{n}": {"properties": {f"f{k}": {"$ref": f"#/$defs/d{n + 1}"} for k in range(9)}} for n in range(40)}
    number_of |= {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}}}
    itself = {"loop": {"anyOf": [{"$ref": "#/$defs/loop"}]}}
    names = ("list", "loop", "d0")
    schema = {"properties": {n: {"$ref": f"#/$defs/{n}"} for n in names}, "$defs": number_of | itself}
    [example] = load(tmp_path, "extractor", {"text": "a", "target": {}, "schema": schema})
    shown = json.loads(example["prompt"].splitlines()[0])
    assert (shown["list"], shown["loop"]) == (["array"], "string") and len(example["prompt"]) < 1_000_000


OFFER = {
    "text": "Total 5\n3 May",
    "target": {"total": 5, "tax": None, "due": "3 May", "net": None},
    "schema": {
        "type": "object",
        "properties": {
            "total": {"type": ["number", "null"]},
            "tax": {"type": ["number", "null"]},
            "net": {"type": "number"},
            "due": {"type": "string", "format": "date"},
        },
        "required": ["total", "tax"],
    },
}


LABELED = {
    "text": "a",
    "target": {"tags": []},
    "schema": {"properties": {"tags": {"type": "array", "items": {"type": "string"}}}, "required": ["tags"]},
}


def test_a_schema_is_checked_once_for_all_the_rows_that_have_it(tmp_path: Path) -> None:
    structures._validator.cache_clear()
    load(tmp_path, "extractor", *(OFFER | {"text": f"Total 5, no. {number}"} for number in range(20)))
    assert structures._validator.cache_info().misses == 1


def test_without_a_schema_fields_are_what_they_hold(tmp_path: Path) -> None:
    rows = [
        {"text": "7 on", "target": {"n": 7, "on": True, "of": ["a", 2], "id": "x", "no": None}},
        {"text": "8.5 off", "target": {"n": 8.5, "on": False, "of": [], "id": 3, "no": None}},
    ]
    first, second = load(tmp_path, "extractor", *rows)
    shown = {"id": ["number", "string"], "n": "number", "no": "string", "of": [["number", "string"]], "on": "boolean"}
    assert json.loads(first["prompt"].splitlines()[0]) == shown
    for example, row in ((first, rows[0]), (second, rows[1])):
        answer = "\n".join(example["steps"])
        assert json.loads(answer) == {name: value for name, value in row["target"].items() if value not in (None, [])}
        assert find_verifier("fields")(answer, answer, json.loads(example["metadata"])).reward == 1


def test_dates_and_decimals_of_parquet_are_as_json_has_them(tmp_path: Path) -> None:
    target = {"due": datetime.date(2024, 5, 3), "total": decimal.Decimal("4.50")}
    pq.write_table(pa.Table.from_pylist([{"text": "a", "target": target}]), tmp_path / "mine.parquet")
    [example] = model_types.find("extractor").load(tmp_path / "mine.parquet", "train").to_pylist()
    assert json.loads("\n".join(example["steps"])) == {"due": "2024-05-03", "total": 4.5}
    pq.write_table(pa.Table.from_pylist([{"text": "a", "target": {"total": b"x"}}]), tmp_path / "mine.parquet")
    with pytest.raises(InputError, match="row 1: column 'target' should be a JSON object: bytes is no JSON"):
        model_types.find("extractor").load(tmp_path / "mine.parquet", "train")


def test_a_field_that_has_to_be_there_is_written_without_a_value(tmp_path: Path) -> None:
    [example] = load(tmp_path, "extractor", OFFER)
    assert json.loads("\n".join(example["steps"])) == {"total": 5, "due": "3 May", "tax": None}


@pytest.mark.parametrize(
    ("model_type", "row"),
    [
        ("srl_parser", SENTENCE),
        ("srl_parser", {"text": "She  likes\tto sing here today", "frames": FRAMES}),
        ("srl_parser", SENTENCE | {"tokens": ["She", "likes", "to", "sing it", "here", "today"]}),
        ("extractor", RECEIPT),
        ("extractor", NEWS),
        ("extractor", OFFER),
        ("extractor", LABELED),
    ],
)
def test_the_experts_own_answer_is_worth_one(tmp_path: Path, model_type: str, row: dict[str, Any]) -> None:
    [example] = load(tmp_path, model_type, row)
    score = find_verifier(example["verifier"])(
        "\n".join(example["steps"]), example["reference"], json.loads(example["metadata"])
    )
    assert (score.outcome, score.reward, score.components["exact"]) == ("scored", 1.0, 1.0)


def test_for_prediction_a_text_is_enough_where_the_card_has_the_schema(tmp_path: Path) -> None:
    load(tmp_path, "extractor", RECEIPT)
    extractor = model_types.find("extractor")
    card = extractor.card([tmp_path / "mine.jsonl"], [])
    (tmp_path / "new.jsonl").write_text('{"text": "SHOP"}\n')
    [example] = extractor.load(tmp_path / "new.jsonl", "dev", Reading(card=card, unanswered=True)).to_pylist()
    assert example["prompt"] == '{"company": "string", "tax": "string", "total": "string"}\nSHOP'
    with pytest.raises(InputError, match="row 1: it has no 'schema'"):
        extractor.load(tmp_path / "new.jsonl", "dev", Reading(unanswered=True))


@pytest.mark.parametrize("split", ["train", "dev"])
def test_held_out_rows_are_asked_for_the_fields_that_are_known(tmp_path: Path, split: Split) -> None:
    load(tmp_path, "extractor", RECEIPT)
    extractor = model_types.find("extractor")
    card = extractor.card([tmp_path / "mine.jsonl"], [])
    own = {"properties": {"n": {"type": "number"}}}
    judged = [
        {"text": "SHOP", "target": {"company": "SHOP"}},
        {"text": "a", "target": {"fax": "a"}},
        {"text": "7", "target": {"n": 7}, "schema": own},
    ]
    (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    for path in (tmp_path, tmp_path / f"{split}.jsonl"):
        first, last = extractor.load(path, split, Reading(card=card, skip_bad=True)).to_pylist()
        assert first["prompt"] == '{"company": "string", "tax": "string", "total": "string"}\nSHOP'
        assert last["prompt"] == '{"n": "number"}\n7'
        with pytest.raises(InputError, match="row 2: field 'fax' is not in the schema: company, tax, total"):
            extractor.load(path, split, Reading(card=card))
    [*_, of_its_own] = extractor.load(tmp_path / f"{split}.jsonl", split, Reading(card={"name": "a base"})).to_pylist()
    assert of_its_own["prompt"] == '{"n": "number"}\n7'


def test_a_card_knows_the_fields_of_each_domain_as_training_did(tmp_path: Path) -> None:
    rows = [RECEIPT | {"domain": "shop"}, NEWS | {"domain": "news"}]
    trained = load(tmp_path, "extractor", *rows)
    extractor = model_types.find("extractor")
    card = extractor.card([tmp_path / "mine.jsonl"], [])
    for unanswered in (False, True):
        asked = extractor.load(tmp_path / "mine.jsonl", "dev", Reading(card=card, unanswered=unanswered))
        assert asked["prompt"].to_pylist() == [example["prompt"] for example in trained]


def test_for_prediction_no_answer_is_read(tmp_path: Path) -> None:
    rows = [OFFER | {"target": answer} for answer in ({}, {"total": "five"}, None)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = model_types.find("extractor").load(tmp_path / "new.jsonl", "dev", Reading(unanswered=True))
    assert table["reference"].to_pylist() == ["{}"] * 3


def test_a_wrong_row_that_is_left_out_has_no_part_in_the_schema(tmp_path: Path) -> None:
    rows = [NEWS, {"text": "a", "entities": [{"type": "x"}]}, {"text": "a" * 100_001, "target": {"y": "a"}}]
    rows.append({"text": "a", "entities": [{"type": "z", "start": 0, "text": "b"}]})
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "not JSON\n")
    extractor, file = model_types.find("extractor"), tmp_path / "mine.jsonl"
    [example] = extractor.load(file, "train", Reading(skip_bad=True)).to_pylist()
    assert set(json.loads(example["metadata"])["schema"]["properties"]) == {"person", "place"}
    with pytest.raises(InputError, match="row 2: column .entities. should be .* at 0, start: field required"):
        extractor.load(file, "train")


@pytest.mark.parametrize(("answer", "lines"), [([], ["[]"]), ({}, ["{}"]), ([1, 2], ["[1,", "2]"])])
def test_json_over_lines_is_json(answer: Any, lines: list[str]) -> None:
    assert as_lines(answer) == lines and json.loads("\n".join(lines)) == answer


def spans(start: int, end: int) -> dict[str, Any]:
    roles = [{"role": "ARG0", "start": 0, "end": 2}, {"role": "ARG1", "start": start, "end": end}]
    return SENTENCE | {"frames": [{"index": 1, "predicate": "likes", "args": roles}]}


@pytest.mark.parametrize(
    ("model_type", "row", "complaint"),
    [
        ("srl_parser", spans(3, 9), "ARG1 of 'likes' spans tokens 3 to 9 of 6"),
        ("srl_parser", spans(1, 3), "the roles of 'likes' overlap at token 1"),
        ("srl_parser", SENTENCE | {"frames": [FRAMES[0], FRAMES[0]]}, "two frames have their predicate at token 3"),
        ("srl_parser", {"text": "a b"}, "column 'frames' should be a list"),
        ("srl_parser", {"text": "a b", "frames": [{"index": 0}]}, "at 0, predicate: field required"),
        (
            "srl_parser",
            {"text": "a b", "frames": [{"predicate": "like.01", "args": []}]},
            "'like.01' is not in the text",
        ),
        ("srl_parser", {"text": "a b", "frames": [{"predicate": "b", "ARG0": "a"}]}, "at 0, args: field required"),
        (
            "extractor",
            OFFER | {"target": {"total": "5", "tax": None}},
            r"not valid by its schema: \$.total: '5' is not",
        ),
        ("extractor", OFFER | {"target": {"total": 5}}, "'tax' is a required property"),
        ("extractor", OFFER | {"schema": {"properties": {"due": {"type": "text"}}}}, r"no JSON Schema: \$.properties"),
        ("extractor", OFFER | {"schema": {"properties": {"due": {"pattern": "("}}}}, "no JSON Schema: "),
        (
            "extractor",
            {"text": "5", "target": {"n": 5}, "schema": {"properties": {"n": {"$ref": "#/$defs/n"}}}},
            "refers to '/\\$defs/n', which is not in it",
        ),
        ("extractor", RECEIPT | {"verifier": "exact"}, "'verifier' is for types of text; .* is verified by 'fields'"),
        ("srl_parser", SENTENCE | {"verifier": "my:own"}, "an answer of srl_parser is verified by 'frames'"),
        ("extractor", {"text": "5", "target": {"n": 10**400}}, "'target' should be .*: JSON with a number that is not"),
        ("extractor", {"text": " ", "target": {}}, "'text' that is not empty"),
        ("extractor", {"text": "a" * 100_000, "target": {"a": "b"}}, "the text has 100,000 characters; it should"),
        ("extractor", {"text": "a"}, "should have 'target', 'entities' or 'slots'"),
        ("extractor", {"text": "a", "entities": [{"type": "x"}]}, "'entities' should be a list of entities with"),
        ("extractor", {"text": "a", "entities": [{"type": "x", "start": 0, "text": "b"}]}, "the x 'b' is not in the"),
        (
            "extractor",
            {"text": "a", "target": {"b": "1"}, "schema": {"properties": {"c": {}}}},
            "'b' is not in",
        ),
        ("extractor", {"text": "a", "target": {}, "schema": {"properties": {"c": 3}}}, "'3' where a field's own"),
        ("extractor", {"text": "a", "target": {"b": "1"}, "schema": []}, None),
    ],
)
def test_what_is_wrong_with_a_row_is_one_line(
    tmp_path: Path, model_type: str, row: dict[str, Any], complaint: str | None
) -> None:
    if complaint is None:  # an empty schema is none
        assert load(tmp_path, model_type, row)
        return
    with pytest.raises(InputError, match=complaint) as caught:
        load(tmp_path, model_type, row)
    assert "row 1: " in str(caught.value) and "\n" not in str(caught.value)


NOTE = {"type": "object", "properties": {"note": {"type": ["string", "null"]}}, "required": ["note"]}
NESTED = {
    "type": "object",
    "properties": {"of": NOTE | {"properties": NOTE["properties"] | {"more": {"type": "string"}}}},
}


@pytest.mark.parametrize(
    ("schema", "target"),
    [(NOTE, {"note": None}), (NOTE, {"note": "x"}), (NESTED, {"of": {"note": None}}), (NESTED, {"of": {"note": "x"}})],
)
def test_a_required_field_that_is_null_is_read_alike_from_every_file(tmp_path: Path, schema: Any, target: Any) -> None:
    row = {"text": "Nothing of note: x", "schema": schema, "target": target}
    padded = row | {"schema": schema | {"properties": schema["properties"] | {"other": None}}}
    of = target.get("of")
    padded["target"] = {"of": of | {"more": None}, "other": None} if of else target | {"other": None}
    as_text = row | {"schema": json.dumps(schema), "target": json.dumps(target)}
    found = []
    for name, rows in {"plain": [row], "padded": [padded], "text": [as_text]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        found.append(structures.load(tmp_path / f"{name}.jsonl", "train", "extractor", "fields"))
    # A table of both kinds of target has a struct for it, with null where the field is null.
    both = [row, row | {"target": {"of": {"note": "x"}} if of else {"note": "x"}, "text": "another: x"}]
    for name, rows in {"arrow": both, "text": [as_text, as_text | {"text": "another: x"}]}.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        found.append(structures.load(tmp_path / f"{name}.parquet", "train", "extractor", "fields"))
    assert [json.loads(table["reference"][0].as_py()) for table in found] == [target] * 5
    assert {table["prompt"][0].as_py() for table in found} == {found[0]["prompt"][0].as_py()}


@pytest.mark.parametrize("column", ["schema", "target", "entities"])
def test_a_column_of_text_that_is_no_json_is_named(tmp_path: Path, column: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "target": {"b": "a"}} | {column: "{b: a}"}) + "\n")
    with pytest.raises(
        InputError, match=f"row 1: column '{column}' should be .* JSON of one; it is text, and not JSON"
    ):
        structures.load(tmp_path / "a.jsonl", "train", "extractor", "fields")
