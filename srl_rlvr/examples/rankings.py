"""Files of questions with candidates → Example tables of the ranking types.

    a folder with corpus.jsonl.gz       queries_train and queries_dev: `query`, `positives` (doc_id's, or an object of
                                        doc_id's and gains), `bm25_top` or another `candidates` list of doc_id's;
                                        without one documents are drawn
    train and dev with `candidates`     `query`, `candidates` (texts), `labels` (a gain each)
    train and dev with `label`          `text`, `label`; the labels of the train file are the candidates, each by its
                                        description where a `labels.jsonl` beside it has one (`label`, `description`)

Beside a train file with labels, `costs.jsonl` may say what a wrong one costs: `label`, `picked` and `cost`, a row each.

What answers a question comes first among its candidates in training, so that it is always there.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pyarrow as pa
from pydantic import Field, TypeAdapter

from srl_rlvr import records
from srl_rlvr.errors import InputError
from srl_rlvr.examples import columns, files

Row = dict[str, Any]
_T = TypeVar("_T")
OUT_OF_SCOPE = "oos"
_TEXTS = TypeAdapter(list[str])
_SOME_TEXTS = TypeAdapter(Annotated[list[str], Field(min_length=1)])
_NUMBERS = TypeAdapter(list[columns.Number])
_GAINS = TypeAdapter(dict[str, columns.NotNegative])
_COST = TypeAdapter(columns.NotNegative)


@dataclass(frozen=True)
class _Choice:
    """Of the candidates that a question is asked with."""

    size: int
    split: files.Split
    ordered: bool

    def of(self, question: str, ranked: Sequence[_T], answers: Sequence[_T]) -> list[_T]:
        """What a search `ranked`. In training `size` of it, or as many as answer: these come first, found or not.

        Where the order counts it is kept, and what answers is there as far as it was found, with others drawn from the
        whole order: beside the first of it, a text from further down would always be the right one.
        """
        if self.split == "dev":
            return list(ranked)
        others = [candidate for candidate in ranked if candidate not in answers]
        if not self.ordered:
            return [*answers, *others][: max(self.size, len(answers))]
        found = [candidate for candidate in ranked if candidate in answers][: self.size]
        drawn = random.Random(f"candidates:{question}").sample(others, min(len(others), self.size - len(found)))
        return sorted([*found, *drawn], key=ranked.index)


def load(
    path: files.Source,
    split: files.Split,
    model_type: str,
    verifier: str,
    *,
    candidates: int = 50,
    limit: int | None = None,
    labels: Mapping[str, str] | None = None,
    unanswered: bool = False,
    skip_bad: bool = False,
    ordered: bool = False,
) -> pa.Table:
    """The Examples of a folder's `split`, the first `limit`: each question with at most so many candidates.

    In the dev split the candidates are those that the data names, in their order: what answers a question is among them
    only if the data's own search found it. `labels` are a model's own, instead of the train file's; for prediction
    rows may be `unanswered`. Under `ordered` metadata has the `ranks` of the candidates: their places in the data's own
    order, from 1 on. Raises InputError naming the file, and the row where there is one.
    """
    corpus_file = None if verifier == "label" else _file(path, "corpus")
    if corpus_file is not None:
        file = _file(path, f"queries_{split}")
        if file is None:
            raise InputError(f"{path}: queries_{split}.jsonl.gz is missing beside {corpus_file.name}")
        corpus = read_corpus(corpus_file, skip_bad)
        answers = {} if unanswered else dict(_answers(file, corpus, []))
    else:
        file, corpus, answers = files.find(path, split), {}, {}
        _, first = next(files.read_rows(file, skip_bad), (1, {}))
        if labels is None and ("label" in first or (verifier == "label" and not unanswered)):
            labels = read_labels(path, skip_bad)
    number_of = {name: number for number, name in enumerate(labels or ())}
    costs = _read_costs(path, number_of)
    choice, doc_ids = _Choice(candidates, split, ordered), list(corpus)

    def example(number: int, row: Row) -> Row:
        where = f"{file}, row {number}"
        if corpus_file is not None:
            asked = _from_corpus(row, where, corpus, doc_ids, None if unanswered else answers, choice)
        elif labels is not None:
            asked = _from_label(row, where, labels, number_of, unanswered)
            asked["metadata"] = {"costs": costs.get(str(row.get("label")), {})}
        else:
            asked = _from_candidates(row, where, choice, unanswered)
        gains, metadata = asked["gains"], asked.get("metadata", {})
        if ordered and "ranks" in asked:
            metadata = metadata | {"ranks": asked["ranks"]}
        return records.example(
            model_type=model_type,
            task=files.task_of(path, file),
            prompt=asked["question"],
            steps=[str(c) for c, _ in sorted(gains.items(), key=lambda item: (-item[1], item[0]))],
            reference=json.dumps({str(c): gain for c, gain in gains.items()}),
            verifier=verifier,
            metadata=metadata,
            difficulty=1.0,
            provenance={"source": file.name, "row": number, "id": row.get("id", row.get("query_id"))},
            candidates=asked["candidates"],
        )

    return files.collect(file, example, limit=limit, skip_bad=skip_bad, keep_repeated=unanswered)


def corpus_of(path: Path, skip_bad: bool = False) -> dict[str, str] | None:
    """The documents of a folder that has a corpus, else None."""
    file = _file(path, "corpus")
    return None if file is None else read_corpus(file, skip_bad)


def read_queries(
    path: Path, split: files.Split, corpus: Mapping[str, str], limit: int | None = None, skip_bad: bool = False
) -> list[tuple[str, dict[str, float]]]:
    """(question, gains by doc_id) of a folder's `split`, the first `limit`. Raises InputError naming the row."""
    file = _file(path, f"queries_{split}")
    if file is None:
        raise InputError(f"{path}: queries_{split}.jsonl.gz is missing beside the corpus")

    return list(itertools.islice(_answers(file, corpus, files.left_out(skip_bad)), limit))


def _answers(
    file: Path, corpus: Mapping[str, str], bad: list[InputError] | None
) -> Iterable[tuple[str, dict[str, float]]]:
    """(question, gains by doc_id) of a file, each question once: what one of its rows calls for is no wrong answer to
    another."""

    def query(number: int, row: Row) -> tuple[str, dict[str, float]]:
        where = f"{file}, row {number}"
        return columns.text(row, "query", where), _positives(row, where, corpus)

    answers: dict[str, dict[str, float]] = {}
    for _, (question, gains) in files.each(file, query, bad):
        known = answers.setdefault(question, {})
        for doc_id, gain in gains.items():
            known[doc_id] = max(gain, known.get(doc_id, 0.0))
    return answers.items()


def _positives(row: Row, where: str, corpus: Mapping[str, str]) -> dict[str, float]:
    """Gains by doc_id; a gain of 0 says that a document was judged, and answers nothing."""
    expected = "a list of doc_id's or an object with their gains"
    if isinstance(row.get("positives"), list):
        gains = dict.fromkeys(columns.take(row, "positives", _TEXTS, expected, where), 1.0)
    else:
        gains = columns.take(row, "positives", _GAINS, expected, where)
    _check_named(gains, where, corpus)
    return {doc_id: gain for doc_id, gain in gains.items() if gain}


def _check_named(doc_ids: Iterable[str], where: str, corpus: Mapping[str, str]) -> None:
    for doc_id in doc_ids:
        if doc_id not in corpus:
            raise InputError(f"{where}: '{doc_id}' names no document of the corpus")


def _from_corpus(
    row: Row,
    where: str,
    corpus: Mapping[str, str],
    doc_ids: Sequence[str],
    answers: Mapping[str, Mapping[str, float]] | None,
    choice: _Choice,
) -> Row:
    question, positives = columns.text(row, "query", where), dict[str, float]()
    if answers is not None:  # of its other rows, too; its own come first
        positives = _positives(row, where, corpus) | dict(answers[question])
    column = next((name for name in ("candidates", "bm25_top") if name in row), None)
    if column:
        ranked = columns.take(row, column, _TEXTS, "a list of doc_id's", where)
        _check_named(ranked, where, corpus)
    elif choice.ordered or answers is None:
        why = "whose order is to count" if choice.ordered else "to be put in order"
        raise InputError(f"{where}: it has no list of 'candidates', {why}")
    else:
        ranked = _any_of(doc_ids, question, positives, choice.size)
    place = {doc_id: number for number, doc_id in enumerate(dict.fromkeys(ranked), start=1)}
    chosen = choice.of(question, list(place), list(positives))
    if choice.split == "dev":
        chosen = chosen[: choice.size]
    if not chosen:
        raise InputError(f"{where}: the candidate list is empty")
    return {
        "question": question,
        "candidates": [corpus[doc_id] for doc_id in chosen],
        "gains": {i: positives[doc_id] for i, doc_id in enumerate(chosen) if doc_id in positives},
        "ranks": [place.get(doc_id) for doc_id in chosen],
        "metadata": {"relevant": sorted(positives.values(), reverse=True)},
    }


def _any_of(doc_ids: Sequence[str], question: str, answers: Iterable[str], size: int) -> list[str]:
    """What answers a question that comes without candidates, among documents drawn from the corpus."""
    rng = random.Random(f"candidates:{question}")
    drawn = rng.sample(doc_ids, min(size, len(doc_ids)))
    kept = list(dict.fromkeys([*answers, *drawn]))[:size]
    rng.shuffle(kept)
    return kept


def read_corpus(file: Path, skip_bad: bool = False) -> dict[str, str]:
    """Texts by doc_id, a title before its text. Raises InputError where an id is missing or repeated; under `skip_bad`
    the first row of an id stands."""
    corpus: dict[str, str] = {}

    def document(number: int, row: Row) -> tuple[str, str]:
        where = f"{file}, row {number}"
        doc_id, text, title = columns.text(row, "doc_id", where), columns.text(row, "text", where), row.get("title")
        if doc_id in corpus:
            raise InputError(f"{where}: doc_id '{doc_id}' is there twice")
        return doc_id, f"{title}\n{text}" if title else text

    bad = files.left_out(skip_bad)
    for _, (doc_id, text) in files.each(file, document, bad):
        corpus[doc_id] = text
    files.say_left_out(file, bad)
    return corpus


def _from_candidates(row: Row, where: str, choice: _Choice, unanswered: bool) -> Row:
    texts = columns.take(row, "candidates", _SOME_TEXTS, "a list of texts that is not empty", where)
    expected = f"one number for each of the {len(texts)} candidates"
    labels = [0.0] * len(texts) if unanswered else columns.take(row, "labels", _NUMBERS, expected, where)
    if len(labels) != len(texts):
        raise InputError(f"{where}: column 'labels' should be {expected}, not {len(labels)}")
    for number, candidate in enumerate(texts, start=1):
        columns.bounded(candidate, f"candidate {number}", where)
    question, answers = columns.text(row, "query", where), [i for i in range(len(texts)) if labels[i] > 0]
    order = choice.of(question, range(len(texts)), sorted(answers, key=lambda i: -labels[i]))
    return {
        "question": question,
        "candidates": [texts[j] for j in order],
        "gains": {i: labels[j] for i, j in enumerate(order) if labels[j] > 0},
        "ranks": [j + 1 for j in order],
    }


def _from_label(row: Row, where: str, labels: Mapping[str, str], number_of: Mapping[str, int], unanswered: bool) -> Row:
    name = OUT_OF_SCOPE if unanswered else columns.text(row, "label", where)
    if name not in number_of and name != OUT_OF_SCOPE:
        raise InputError(f"{where}: label '{name}' is not among the {len(labels)} that are trained")
    return {
        "question": columns.text(row, "text", where),
        "candidates": list(labels.values()),
        "gains": {} if name == OUT_OF_SCOPE else {number_of[name]: 1.0},
    }


def _read_costs(path: files.Source, number_of: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """By right label: what each wrong one costs, by its number."""
    file = _file(_beside(path), "costs")
    costs: dict[str, dict[str, float]] = {}
    for number, row in () if file is None else files.read_rows(file):
        where = f"{file}, row {number}"
        label, picked = columns.text(row, "label", where), columns.text(row, "picked", where)
        unknown = next((name for name in (label, picked) if name not in number_of), None)
        if unknown is not None:
            raise InputError(f"{where}: label '{unknown}' is not among the {len(number_of)} that are trained")
        cost = columns.take(row, "cost", _COST, "a number of 0 or more", where)
        costs.setdefault(label, {})[str(number_of[picked])] = cost
    return costs


def read_labels(path: files.Source, skip_bad: bool = False) -> dict[str, str]:
    """Every label of the train file, sorted, and the text that stands for it. What is out of scope has none."""
    train = files.find(path, "train")

    def label(number: int, row: Row) -> str:
        where = f"{train}, row {number}"
        name, _ = columns.text(row, "label", where), columns.text(row, "text", where)
        return name

    names = sorted({name for _, name in files.each(train, label, files.left_out(skip_bad))} - {OUT_OF_SCOPE})
    file = _file(_beside(path), "labels")

    def description(number: int, row: Row) -> tuple[str, str]:
        where = f"{file}, row {number}"
        return columns.text(row, "label", where), columns.text(row, "description", where)

    described = dict(pair for _, pair in files.each(file, description)) if file else {}
    return {name: described.get(name, name.replace("_", " ")) for name in names}


def _beside(path: files.Source) -> files.Source:
    """Where what belongs to a train file stands: its folder."""
    return path if isinstance(path, files.InMemory) or path.is_dir() else path.parent


def _file(path: files.Source, name: str) -> Path | None:
    """A folder's file of that name."""
    if isinstance(path, files.InMemory):
        return None
    found: Sequence[Path] = [path / f"{name}{suffix}" for suffix in files.SUFFIXES]
    return next((file for file in found if file.is_file()), None)
