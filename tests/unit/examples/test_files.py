import datetime
import decimal
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srl_rlvr import records
from srl_rlvr.errors import InputError
from srl_rlvr.examples.files import load, read_rows
from srl_rlvr.verifiers import find_verifier

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the development data is not beside this checkout")

FOUR = {"question": "What is 2 + 2?", "answer": "4"}


def write(path: Path, *rows: object) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def only(path: Path, *rows: object) -> dict[str, Any]:
    return load(write(path, *rows)).to_pylist()[0]


@needs_data
@pytest.mark.parametrize(
    ("name", "verifier", "least_mean_steps"),
    [("gsm8k", "numeric", 3), ("svamp", "numeric", 1), ("aqua_rat", "choice", 2), ("folio", "choice", 0)],
)
@pytest.mark.parametrize("split", ["train", "dev"])
def test_the_development_data_loads_as_it_is(name: str, verifier: str, least_mean_steps: int, split):
    table = records.check("Example", load(DATA / name, split=split))
    with gzip.open(DATA / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = sum(1 for _ in lines)
    examples = table.to_pylist()
    assert 0.98 * rows <= len(examples) <= rows
    assert {(e["task"], e["verifier"], e["model_type"]) for e in examples} == {(name, verifier, "task_llm")}
    assert sum(len(e["steps"]) for e in examples) / len(examples) >= least_mean_steps
    assert all(e["reference"] and e["prompt"] for e in examples)
    assert not any("\n" in step or not step.strip() for e in examples for step in e["steps"])


@needs_data
def test_the_steps_of_svamp_end_in_its_answer():
    examples = load(DATA / "svamp").to_pylist()
    assert all(e["steps"][-1].endswith(f"= {e['reference']}") for e in examples if e["steps"])
    assert sum(bool(e["steps"]) for e in examples) > 0.97 * len(examples)


def test_an_equation_that_contradicts_the_answer_teaches_no_steps(tmp_path: Path):
    row = only(tmp_path / "a.jsonl", {"question": "q", "equation": "( 2.0 + 3.0 )", "answer": "1"})
    assert (row["steps"], row["reference"]) == ([], "1")


def test_an_equation_gives_one_step_for_each_operation(tmp_path: Path):
    row = only(tmp_path / "a.jsonl", {"question": "q", "equation": "( 14.0 - ( 4.0 * 3.0 ) )", "answer": "2"})
    assert (row["steps"], row["verifier"], row["difficulty"]) == (["4 * 3 = 12", "14 - 12 = 2"], "numeric", 2)


def test_options_are_part_of_the_prompt_and_headings_or_lines_that_only_name_the_letter_are_no_steps(tmp_path: Path):
    rationale = "Solution:\n9 * 60 = 540\n\nCorrect Option: A\nAnswer: A."
    row = only(
        tmp_path / "a.jsonl", {"question": "q", "options": ["A)540", "B)6"], "rationale": rationale, "answer": "A"}
    )
    assert row["prompt"] == "q\nA) 540\nB) 6"
    assert row["steps"] == ["9 * 60 = 540"]
    assert (row["reference"], row["verifier"], json.loads(row["metadata"])) == ("A", "choice", {"labels": ["A", "B"]})


def test_options_without_letters_get_them(tmp_path: Path):
    assert only(tmp_path / "a.jsonl", {"question": "q", "options": ["5", "6"], "answer": "B"})["prompt"].endswith(
        "B) 6"
    )


def test_premises_and_conclusion_become_one_question(tmp_path: Path):
    row = only(
        tmp_path / "a.jsonl", {"premises": ["All a are b.", "c is a."], "conclusion": "c is b.", "label": "True"}
    )
    assert row["prompt"].startswith("All a are b.\nc is a.\nConclusion: c is b.\n")
    assert (row["steps"], row["reference"], row["verifier"]) == ([], "True", "choice")


@pytest.mark.parametrize(
    ("row", "all_of_them"),
    [
        ({"premises": [], "conclusion": "a", "label": "True"}, "True or False or Unknown"),
        ({"question": "q", "options": ["A)1", "F)2"], "answer": "F"}, "A or F"),
    ],
)
def test_naming_every_choice_is_no_answer(tmp_path: Path, row: dict[str, Any], all_of_them: str):
    example = only(tmp_path / "a.jsonl", row)
    reference, metadata = example["reference"], json.loads(example["metadata"])
    answers = [f"Answer: {answer}" for answer in (reference, all_of_them)]
    assert [find_verifier("choice")(answer, reference, metadata).reward for answer in answers] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("extra", "steps"),
    [
        ({}, []),
        ({"steps": ["2 + 2 = 4"]}, ["2 + 2 = 4"]),
        ({"solution": "two\n\n two more\n"}, ["two", "two more"]),
        ({"answer": "2+2=<<2+2=4>>4\n#### 4"}, ["2+2=4"]),
        ({"steps": None, "solution": "two"}, ["two"]),
    ],
)
def test_a_users_file_needs_no_more_than_question_and_answer(tmp_path: Path, extra: dict[str, Any], steps: list[str]):
    row = only(tmp_path / "mine.jsonl.gz", {**FOUR, **extra})
    assert (row["steps"], row["reference"], row["verifier"], row["task"]) == (steps, "4", "numeric", "mine")


@pytest.mark.parametrize(
    ("answer", "reference", "verifier"),
    [
        ("1,234.5", "1234.5", "numeric"),
        (7, "7", "numeric"),
        (-2.5, "-2.5", "numeric"),
        (0.00001, "1e-05", "numeric"),
        (1e16, "1e+16", "numeric"),
        ("1,234,567", "1234567", "numeric"),
        ("1,2", "1,2", "expression"),
        ("1234,567", "1234,567", "expression"),
        ("1,", "1,", "expression"),
        (r"\frac{1}{2}", r"\frac{1}{2}", "expression"),
        ("x^2 + 1", "x^2 + 1", "expression"),
    ],
)
def test_the_answers_form_decides_the_verifier(tmp_path: Path, answer: object, reference: str, verifier: str):
    row = only(tmp_path / "a.jsonl", {"question": "q", "answer": answer})
    assert (row["reference"], row["verifier"]) == (reference, verifier)


def test_a_small_float_is_a_reference_that_its_own_value_meets(tmp_path: Path):
    row = only(tmp_path / "a.jsonl", {"question": "q", "answer": 0.00001})
    assert find_verifier(row["verifier"])("Answer: 0.00001", row["reference"], {}).reward == 1.0


def test_a_verifier_column_overrides(tmp_path: Path):
    assert only(tmp_path / "a.jsonl", {**FOUR, "verifier": "expression"})["verifier"] == "expression"


@pytest.mark.parametrize("name", ["timeit:timeit", "os:system", "checks:other", "checks"])
def test_a_row_never_names_code_that_is_not_declared(tmp_path: Path, name: str):
    path = write(tmp_path / "a.jsonl", FOUR, {"question": "q", "answer": "import os", "verifier": name})
    for unanswered in (False, True):
        with pytest.raises(InputError, match=f"a.jsonl, row 2: verifier '{name}' is "):
            load(path, verifiers=["checks:right"], unanswered=unanswered)
    assert load(path, verifiers=["checks:right"], skip_bad=True).num_rows == 1
    row = {"question": "q", "answer": "1", "verifier": "checks:right"}
    assert load(write(path, row), verifiers=["checks:right"])["verifier"].to_pylist() == ["checks:right"]


@pytest.mark.parametrize("name", ["fields", "ndcg", "reasoning_gym"])
def test_a_row_names_no_verifier_that_needs_what_rows_do_not_have(tmp_path: Path, name: str):
    with pytest.raises(InputError, match=f"row 1: column 'verifier' is '{name}'; rows of text may name exact, "):
        load(write(tmp_path / "a.jsonl", {**FOUR, "verifier": name}))


def test_provenance_names_file_row_and_the_rows_own_id(tmp_path: Path):
    row = only(tmp_path / "a.jsonl", {**FOUR, "id": "mine-1"})
    assert json.loads(row["provenance"]) == {"source": "a.jsonl", "row": 1, "id": "mine-1"}


def test_a_repeated_problem_is_kept_once_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    copy = {"question": "What is  2 + 2? ", "answer": "5"}
    with caplog.at_level(logging.WARNING):
        table = load(write(tmp_path / "a.jsonl", FOUR, copy, {"question": "q", "answer": "1"}))
    assert table["reference"].to_pylist() == ["4", "1"]
    assert "rows dropped that repeat an earlier problem: 1" in caplog.text


def test_rows_that_contradict_each_other_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    five, again = {"question": "What is 2 + 2?", "answer": "5"}, {**FOUR, "answer": "4.0"}
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path / "a.jsonl", FOUR, again, {"question": "q", "answer": "1"}, five))
    assert "different answers: 1 and 4;" in caplog.text


def test_of_copies_the_one_with_worked_steps_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    worked = {**FOUR, "answer": 4.0, "steps": ["2 + 2 = 4"]}
    with caplog.at_level(logging.WARNING):
        [row] = load(write(tmp_path / "a.jsonl", FOUR, worked, FOUR)).to_pylist()
    assert row["steps"] == ["2 + 2 = 4"] and "different answers" not in caplog.text


def test_one_question_in_two_compositions_of_unicode_is_one_problem(tmp_path: Path):
    rows = [{"question": f"Caf{e} or t{e}a?", "answer": "1"} for e in ("\u00e9", "e\u0301")]
    assert load(write(tmp_path / "a.jsonl", *rows)).num_rows == 1


def test_limit_takes_the_first_rows_and_split_the_file_asked_for(tmp_path: Path):
    write(tmp_path / "train.jsonl.gz", FOUR, {"question": "q", "answer": "1"})
    write(tmp_path / "dev.jsonl", {"question": "other", "answer": "2"})
    assert load(tmp_path, limit=1)["reference"].to_pylist() == ["4"]
    assert load(tmp_path, split="dev")["reference"].to_pylist() == ["2"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [FOUR, {"questions": "q", "answer": "1"}],
            "row 2: column 'question' is missing; it has questions, answer; did",
        ),
        ([{"text": "hello", "answer": "1"}], "row 1: column 'question' is missing; it has text, answer"),
        ([{"question": "q", "anwser": "1"}], "did you mean 'anwser'?"),
        (
            [FOUR, {"question": 3, "answer": "1"}],
            "row 2: column 'question' should be text that is not empty, not a number",
        ),
        ([{**FOUR, "steps": "2 + 2"}], "row 1: column 'steps' should be a list of texts, not text"),
        ([{"question": "q", "answer": None}], "column 'answer' should be text or a finite number, not null"),
        ([{"question": "q", "answer": " "}], "row 1: column 'answer' is empty"),
        ([FOUR, "{not json"], "line 2: not JSON"),
        (
            [FOUR, '{"question": "a", "answer": 1, "question": "b"}'],
            "line 2: not JSON that can be read (the key 'question'",
        ),
        (
            [{**FOUR, "more": {}}, '{"question": "a", "answer": 1, "more": {"x": 1, "x": 2}}'],
            "line 2: not JSON that can",
        ),
        ([FOUR, "[1, 2]"], "line 2: a row should be a JSON object, not a list"),
        ([], "the file holds no rows"),
        ([{"question": "q", "options": ["A)1"], "answer": "F"}], "column 'answer' is 'F'; it should be one of"),
        ([{"question": "q", "equation": "2 ^ 3", "answer": "8"}], "row 1: column 'equation': '2 ^ 3' holds more than"),
        ([{"premises": ["p"], "conclusion": "c", "label": "Maybe"}], "column 'label' is 'Maybe'; it should be one of"),
    ],
)
def test_a_bad_file_is_said_in_one_line_with_its_place(tmp_path: Path, rows: list[object], says: str):
    with pytest.raises(InputError) as raised:
        load(write(tmp_path / "mine.jsonl", *rows))
    assert says in str(raised.value) and "mine.jsonl" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_parquet_holds_and_json_does_not_is_one_line(tmp_path: Path):
    for column, says in (
        (
            {"question": b"\xff", "answer": "1"},
            "row 1: column 'question' should be text that is not empty, not bytes",
        ),
        ({"question": "q", "answer": b"1"}, "row 1: column 'answer' should be text or a finite"),
    ):
        pq.write_table(pa.Table.from_pylist([column]), tmp_path / "a.parquet")
        with pytest.raises(InputError, match=says):
            load(tmp_path / "a.parquet")
    texts = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"question": texts, "answer": ["1"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="a.parquet: a column of texts holds what is not UTF-8"):
        load(tmp_path / "a.parquet")


def test_dates_times_and_decimals_of_parquet_are_texts(tmp_path: Path):
    answers = (
        (datetime.date(2024, 5, 3), "2024-05-03", "exact"), (datetime.time(21, 30), "21:30:00", "exact"),
        (decimal.Decimal("2.50"), "2.50", "numeric"), (decimal.Decimal("1E+3"), "1000", "numeric"),
    )  # fmt: skip
    for answer, reference, verifier in answers:
        pq.write_table(pa.table({"question": ["q"], "answer": [answer]}), tmp_path / "a.parquet")
        [row] = load(tmp_path / "a.parquet").to_pylist()
        assert (row["reference"], row["verifier"]) == (reference, verifier)


def test_numbers_that_stand_for_names_are_read_by_them(tmp_path: Path):
    features = {"label": {"names": ["True", "False", "Unknown"], "_type": "ClassLabel"}}
    table = pa.table({"premises": [["p"]] * 2, "conclusion": ["a", "b"], "label": [2, 0]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet")["reference"].to_pylist() == ["Unknown", "True"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "put the user's turn of 'messages' into 'question'"),
        ({"prompt": [{"role": "user", "content": "q"}], "answer": "1"}, "put the user's turn of 'prompt' into"),
        ({"prompt": "q", "completion": "1"}, "rename 'prompt' to 'question'"),
        ({"instruction": "q", "input": "", "output": "1"}, "rename 'instruction' to 'question'"),
        ({"Question": "q", "Answer": "1"}, "did you mean 'Question'?"),
        ({"question": "q", "completion": "1"}, "rename 'completion' to 'answer'"),
    ],
)
def test_another_layout_is_refused_with_what_to_rename_and_what_is_read(tmp_path: Path, row: dict[str, Any], says: str):
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(InputError) as raised:
        load(path)
    assert says in str(raised.value) and "columns read: question + answer, or " in str(raised.value)
    if "question" not in row:
        with pytest.raises(InputError) as raised:
            load(path, unanswered=True)
        assert f"it has {', '.join(row)}; " in str(raised.value) and "columns read: question, or " in str(raised.value)


def test_shards_are_named(tmp_path: Path):
    (tmp_path / "train-00000-of-00002.parquet").touch()
    with pytest.raises(InputError, match="join them into train.parquet"):
        load(tmp_path)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path):
    write(tmp_path / "train.jsonl.gz", FOUR)
    with pytest.raises(InputError, match="no such file; did you mean 'train.jsonl.gz'?"):
        load(tmp_path / "trian.jsonl.gz")
    with pytest.raises(InputError, match=r"no dev.jsonl.gz, .jsonl or .parquet"):
        load(tmp_path, split="dev")


def test_files_that_are_not_gzip_not_whole_not_text_or_not_json_lines_are_refused(tmp_path: Path):
    whole = write(tmp_path / "whole.jsonl.gz", *({"question": f"q{n}", "answer": n} for n in range(99))).read_bytes()
    for name, content, says in [
        ("plain.jsonl.gz", b'{"question": "q", "answer": 1}\n', "not a whole gzip file"),
        ("cut.jsonl.gz", whole[: len(whole) // 2], "not a whole gzip file"),
        ("latin.jsonl", '{"question": "café", "answer": 1}'.encode("latin-1"), "line 1: not UTF-8"),
        ("table.csv", b"question,answer\n", "files should end in .jsonl.gz or .jsonl"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=says):
            load(tmp_path / name)


def test_prediction_keeps_every_row_though_it_repeats_one_or_has_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    write(path, {"question": "1 + 1?"}, {"question": "1 + 1?", "answer": None}, {"question": "2 + 2?", "answer": []})
    assert load(path, unanswered=True)["prompt"].to_pylist() == ["1 + 1?", "1 + 1?", "2 + 2?"]
    path.write_text('{"question": "Which?", "options": ["one", "two"]}\n')
    assert load(path, unanswered=True)["prompt"].to_pylist() == ["Which?\nA) one\nB) two"]
    path.write_text('{"premises": ["All x are y."], "conclusion": "So it is."}\n')
    assert load(path, unanswered=True)["prompt"].to_pylist()[0].startswith("All x are y.\nConclusion: So it is.")


def test_parquet_is_read_as_the_same_json_lines_are(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "Rome 753", "target": {"city": {"name": "Rome", "year": 753}}},
        {"text": "Paris", "target": {"city": {"name": "Paris"}}},
    ]
    write(tmp_path / "a.jsonl", *rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    of_lines, of_parquet = (list(read_rows(tmp_path / name)) for name in ("a.jsonl", "a.parquet"))
    assert of_lines == of_parquet


@pytest.mark.parametrize(
    ("answer", "verifier"),
    [
        *((words, "exact") for words in ("la maison", "Fine, thanks.", "3 cats", "l'été")),
        *((formula, "expression") for formula in ("x**2 + 1", "2*sin(x)", "abs(theta)", "\\text{Monday}", "xy", "1/2")),
    ],
)
def test_words_are_compared_as_words_and_mathematics_as_mathematics(tmp_path: Path, answer: str, verifier: str) -> None:
    write(tmp_path / "a.jsonl", {"question": "q", "answer": answer})
    assert load(tmp_path / "a.jsonl")["verifier"].to_pylist() == [verifier]


def test_bad_rows_are_left_out_only_when_asked_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question": "1 + 1", "answer": "2"}\nnot JSON\n\xff\n[1]\n{"question": " ", "answer": "2"}\n'
                     b'{"question": "2 + 2", "answer": "4"}\n')  # fmt: skip
    with pytest.raises(InputError, match="line 2: not JSON"):
        load(path)
    found = load(path, skip_bad=True)
    assert found["reference"].to_pylist() == ["2", "4"]
    assert "wrong rows left out: 4; the first: " in caplog.text and "line 2: not JSON" in caplog.text
    path.write_text("[]\n")
    with pytest.raises(InputError, match="holds no rows that are right"):
        load(path, skip_bad=True)
