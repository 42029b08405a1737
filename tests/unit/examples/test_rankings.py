"""Files of questions with candidates, and what is wrong with them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from srl_rlvr import model_types
from srl_rlvr.config import SourceConfig
from srl_rlvr.errors import InputError
from srl_rlvr.examples import rankings, sources
from srl_rlvr.examples.files import Reading

CORPUS = [{"doc_id": f"d{i}", "title": "T" if i == 0 else "", "text": f"text {i}"} for i in range(6)]
QUERY = {"query_id": "q", "query": "what?", "positives": ["d3", "d1"], "bm25_top": ["d0", "d3", "d2", "d4"]}
SENTENCES = {"query_id": "s", "query": "who?", "candidates": ["a", "b", "c"], "labels": [0, 0, 1]}


def write(folder: Path, **files: Sequence[Mapping[str, Any]]) -> Path:
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def corpus_folder(folder: Path, **changes: Any) -> Path:
    return write(folder, **({"corpus": CORPUS, "queries_train": [QUERY], "queries_dev": [QUERY]} | changes))


def load(path: Path, split: Any = "train", model_type: str = "embeddings", candidates: int = 4) -> list[dict[str, Any]]:
    return rankings.load(path, split, model_type, "ndcg", candidates=candidates).to_pylist()


def test_in_training_what_answers_a_question_comes_first(tmp_path: Path) -> None:
    [example] = load(corpus_folder(tmp_path))
    assert example["candidates"] == ["text 3", "text 1", "T\ntext 0", "text 2"]
    assert json.loads(example["reference"]) == {"0": 1.0, "1": 1.0} and example["steps"] == ["0", "1"]


def test_where_it_is_judged_the_candidates_are_what_the_search_found(tmp_path: Path) -> None:
    [example] = load(corpus_folder(tmp_path), "dev")
    assert example["candidates"] == ["T\ntext 0", "text 3", "text 2", "text 4"]
    assert json.loads(example["reference"]) == {"1": 1.0}
    assert json.loads(example["metadata"]) == {"relevant": [1.0, 1.0]}


def test_an_order_that_counts_gives_each_candidate_its_place(tmp_path: Path) -> None:
    folder = corpus_folder(tmp_path)

    def read(path: Path, split: Any, candidates: int = 4) -> list[dict[str, Any]]:
        how = Reading(candidates=candidates, ordered=True)
        return model_types.find("reranker").load(path, split, how).to_pylist()

    def places(example: Mapping[str, Any]) -> list[int]:
        return json.loads(example["metadata"])["ranks"]

    [train], [dev] = read(folder, "train"), read(folder, "dev")
    assert train["candidates"] == dev["candidates"] == ["T\ntext 0", "text 3", "text 2", "text 4"]
    assert places(train) == places(dev) == [1, 2, 3, 4] and train["steps"] == ["1"]  # d1 has not been found
    many = [QUERY | {"query": f"q{n}", "bm25_top": ["d3", "d0", "d1", "d2", "d4", "d5"]} for n in range(200)]
    rows = read(corpus_folder(folder, queries_train=many), "train", 3)
    drawn = Counter(place for row in rows for place in places(row))
    assert drawn[1] == drawn[3] == 200 and all(30 < drawn[place] < 70 for place in (2, 4, 5, 6))
    write(folder, plain=[SENTENCES])
    [alone] = read(folder / "plain.jsonl", "train")
    assert places(alone) == [1, 2, 3] and alone["steps"] == ["2"]
    of_model = Reading(card={"ordered": True}, unanswered=True)
    [asked] = model_types.find("reranker").load(folder / "plain.jsonl", "dev", of_model).to_pylist()
    assert json.loads(asked["metadata"]) == {"ranks": [1, 2, 3]}


def test_gains_order_the_experts_picks(tmp_path: Path) -> None:
    graded = QUERY | {"positives": {"d3": 1, "d1": 3}}
    [example] = load(corpus_folder(tmp_path, queries_train=[graded]))
    assert example["steps"] == ["1", "0"] and json.loads(example["reference"]) == {"0": 1.0, "1": 3.0}


def test_a_question_without_candidates_is_asked_with_documents_that_are_drawn(tmp_path: Path) -> None:
    asked = [{"query": f"q{n}", "positives": ["d3"]} for n in range(40)]
    folder = corpus_folder(tmp_path, queries_train=asked, queries_dev=asked)
    drawn = Counter(text for row in load(folder, candidates=3) for text in row["candidates"][1:])
    assert len(drawn) == 5 and {row["candidates"][0] for row in load(folder, candidates=3)} == {"text 3"}
    places = Counter(row["steps"][0] for row in load(folder, "dev", candidates=3))
    assert set(places) == {"0", "1", "2"} and load(folder, "dev", candidates=3) == load(folder, "dev", candidates=3)
    with pytest.raises(InputError, match=r"queries_train.jsonl, row 1: it has no list of 'candidates'"):
        rankings.load(folder, "train", "reranker", "ndcg", ordered=True)


def test_all_that_answers_a_question_is_there_however_few_candidates_it_has(tmp_path: Path) -> None:
    [example] = load(corpus_folder(tmp_path), candidates=1)
    assert example["candidates"] == ["text 3", "text 1"]


def test_a_document_is_a_candidate_once_and_answers_nothing_with_a_gain_of_zero(tmp_path: Path) -> None:
    asked = QUERY | {"positives": {"d3": 1, "d1": 0}, "bm25_top": ["d0", "d3", "d0", "d1"]}
    folder = corpus_folder(tmp_path, queries_train=[asked], queries_dev=[asked])
    [train], [dev] = load(folder), load(folder, "dev")
    assert train["candidates"] == ["text 3", "T\ntext 0", "text 1"] and train["steps"] == ["0"]
    assert dev["candidates"] == ["T\ntext 0", "text 3", "text 1"] and dev["steps"] == ["1"]
    assert json.loads(dev["metadata"]) == {"relevant": [1.0]}


def test_what_answers_a_question_in_another_row_is_no_wrong_answer(tmp_path: Path) -> None:
    asked = [QUERY | {"positives": [doc_id], "bm25_top": ["d3", "d1", "d0"]} for doc_id in ("d3", "d1")]
    folder = corpus_folder(tmp_path, queries_train=asked, queries_dev=asked)
    first, second = load(folder)
    assert first["candidates"] == ["text 3", "text 1", "T\ntext 0"] and first["steps"] == ["0", "1"]
    assert second["candidates"] == ["text 1", "text 3", "T\ntext 0"] and second["steps"] == ["0", "1"]
    [dev] = load(folder, "dev")
    assert json.loads(dev["reference"]) == {"0": 1.0, "1": 1.0}
    [(question, gains)] = rankings.read_queries(folder, "dev", rankings.corpus_of(folder) or {})
    assert (question, gains) == ("what?", {"d3": 1.0, "d1": 1.0})


def test_rows_may_bring_their_own_candidates(tmp_path: Path) -> None:
    folder = write(tmp_path, train=[SENTENCES], dev=[SENTENCES])
    [train], [dev] = load(folder, "train", candidates=2), load(folder, "dev")
    assert train["candidates"] == ["c", "a"] and train["steps"] == ["0"]
    assert dev["candidates"] == ["a", "b", "c"] and dev["steps"] == ["2"]


def test_labels_are_candidates_by_their_description(tmp_path: Path) -> None:
    rows = [{"text": "pay it", "label": "pay_bill"}, {"text": "hello", "label": "greeting"}]
    folder = write(tmp_path, train=rows, dev=rows[:1], labels=[{"label": "greeting", "description": "says hello"}])
    first, second = load(folder, model_type="intent_router")
    assert first["candidates"] == second["candidates"] == ["says hello", "pay bill"]
    assert (first["steps"], second["steps"]) == (["1"], ["0"])


def test_a_wrong_label_may_have_a_cost(tmp_path: Path) -> None:
    rows = [{"text": "pay it", "label": "pay"}, {"text": "hello", "label": "greet"}]
    folder = write(tmp_path, train=rows, costs=[{"label": "pay", "picked": "greet", "cost": 0.5}])
    pay, greet = load(folder, model_type="intent_router")
    assert json.loads(pay["metadata"]) == {"costs": {"0": 0.5}} and json.loads(greet["metadata"]) == {"costs": {}}
    for wrong, complaint in (({"picked": "x"}, "label 'x' is not among the 2"), ({"cost": -1}, "'cost' should be")):
        write(tmp_path, costs=[{"label": "pay", "picked": "greet", "cost": 0.5} | wrong])
        with pytest.raises(InputError, match=complaint):
            load(folder, model_type="intent_router")


def test_a_run_reads_what_its_type_reads(tmp_path: Path) -> None:
    source = SourceConfig(path=str(corpus_folder(tmp_path, queries_dev=[QUERY | {"query": "else?"}])), candidates=3)
    train, _, held_out = sources.load_all([source], 0, "reranker")
    assert [len(row["candidates"]) for row in (*train.to_pylist(), *held_out.to_pylist())] == [3, 4]
    assert train["model_type"].to_pylist() == ["reranker"]


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"queries_train": [QUERY | {"positives": ["d9"]}]}, "'d9' names no document"),
        ({"queries_train": [QUERY | {"bm25_top": ["d0", "x"]}]}, "'x' names no document"),
        ({"queries_train": [QUERY | {"positives": [], "bm25_top": []}]}, "the candidate list is empty"),
        ({"queries_train": [QUERY | {"query": " "}]}, "column 'query' should be text"),
        ({"queries_train": [QUERY | {"positives": "d1"}]}, "'positives' should be a list"),
        ({"corpus": [*CORPUS, CORPUS[2]]}, "doc_id 'd2' is there twice"),
        ({"queries_train": []}, "holds no rows"),
    ],
)
def test_what_is_wrong_with_a_corpus_is_one_line_with_its_row(
    tmp_path: Path, files: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        load(corpus_folder(tmp_path, **files))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (SENTENCES | {"candidates": []}, "row 1: column 'candidates'"),
        (SENTENCES | {"labels": [1]}, "one number for each of the 3 candidates"),
    ],
)
def test_what_is_wrong_with_a_row_is_one_line(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        load(write(tmp_path, train=[row]))


def test_what_is_out_of_scope_is_no_label_and_no_problem_to_train_on(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "oos" if i % 2 else "x"} for i in range(6)]
    source = SourceConfig(path=str(write(tmp_path, train=rows, dev=[{"text": "new", "label": "oos"}])), dev=2)
    train, dev, held_out = sources.load_all([source], 0, "intent_router")
    assert [row["candidates"] for row in train.to_pylist()] == [["x"]] * 2
    assert [json.loads(row["reference"]) for row in dev.to_pylist()] == [{"0": 1.0}, {}, {}, {}]
    assert json.loads(held_out.to_pylist()[0]["reference"]) == {}


def test_for_prediction_rows_need_no_answer_and_the_labels_are_the_models(tmp_path: Path) -> None:
    folder = write(
        tmp_path, dev=[{"text": "hello"}], plain=[{"query": "who?", "candidates": ["a", "b"], "labels": [1]}]
    )
    routed = rankings.load(folder / "dev.jsonl", "dev", "intent_router", "label", labels={"x": "ex"}, unanswered=True)
    assert routed.to_pylist()[0]["candidates"] == ["ex"]
    ranked = rankings.load(folder / "plain.jsonl", "dev", "reranker", "ndcg", unanswered=True)
    assert ranked.to_pylist()[0]["candidates"] == ["a", "b"]
    asked = [{"query": "who?", "candidates": ["d1", "d0"]}, {"query": "what?"}]
    corpus = corpus_folder(tmp_path, queries_dev=asked)
    with pytest.raises(InputError, match="row 2: it has no list of 'candidates', to be put in order"):
        rankings.load(corpus, "dev", "reranker", "ndcg", unanswered=True)
    [found] = rankings.load(corpus, "dev", "reranker", "ndcg", unanswered=True, skip_bad=True).to_pylist()
    assert len(found["candidates"]) == 2 and not found["steps"]


def test_a_router_wants_labels(tmp_path: Path) -> None:
    router = model_types.find("intent_router")
    with pytest.raises(InputError, match="row 1: column 'label' is missing; it has query_id, query, cand"):
        router.load(write(tmp_path, train=[SENTENCES]), "train")
    with pytest.raises(InputError, match=r"no train.jsonl.gz, .jsonl or .parquet"):
        (tmp_path / "train.jsonl").unlink()
        router.load(corpus_folder(tmp_path), "train")


def test_wrong_rows_leave_no_trace_where_they_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skipping = Reading(skip_bad=True)
    write(tmp_path, train=[{"text": "no label"}, {"text": "pay it", "label": "pay"}, {"text": " ", "label": "x"}])
    [example] = model_types.find("intent_router").load(tmp_path, "train", skipping).to_pylist()
    assert example["candidates"] == ["pay"] and "wrong rows left out: 2; the first: " in caplog.text
    corpus_folder(tmp_path, corpus=[*CORPUS, CORPUS[2] | {"text": "another"}, {"doc_id": "d9"}])
    [example] = model_types.find("embeddings").load(tmp_path, "train", skipping).to_pylist()
    assert "text 2" in example["candidates"] and "another" not in example["candidates"]
    assert "corpus.jsonl: wrong rows left out: 2; the first: " in caplog.text
    assert set(rankings.corpus_of(tmp_path, skip_bad=True) or ()) == {row["doc_id"] for row in CORPUS}


def test_a_label_that_training_does_not_have_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, train=[{"text": "a", "label": "x"}], dev=[{"text": "b", "label": "y"}])
    with pytest.raises(InputError, match="label 'y' is not among the 1 that are trained"):
        load(folder, "dev", "intent_router")


def test_a_number_as_a_label_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "hi", "label": 3}\n')
    with pytest.raises(InputError, match=r"row 1: column 'label' .*not a number \(3\): write what it stands for"):
        rankings.load(tmp_path, "train", "intent_router", "label")


def test_two_labels_of_one_text_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = ({"text": "hi", "label": "greet"}, {"text": "bye", "label": "leave"}, {"text": "hi", "label": "leave"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rankings.load(tmp_path, "train", "intent_router", "label").num_rows == 2
    assert "different answers: 1 and 3;" in caplog.text
