"""Ranking types: an expert's order in tokens, and what the questions of a batch share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srl_rlvr import model_types, records
from srl_rlvr.config import SrlStage
from srl_rlvr.engines.ranking_engine import RankingEngine
from srl_rlvr.examples.files import WHOLE
from srl_rlvr.policies.questions import unpack
from srl_rlvr.stages import rlvr, sft, srl

STAGE = SrlStage.model_validate({"kind": "srl"})


def example(question: str, *candidates: str, gains: str = '{"0": 1.0}', steps: tuple[str, ...] = ("0",)) -> Any:
    return records.example(
        model_type="embeddings", task="t", prompt=question, steps=steps, reference=gains, verifier="ndcg",
        candidates=candidates,
    )  # fmt: skip


@pytest.fixture()
def examples() -> Any:
    return records.build(
        "Example",
        [example("ab", "c", "d", gains='{"0": 2.0, "1": 1.0}', steps=("0", "1")), example("x", "e", "c")],
    )


def test_srl_asks_for_one_pick_after_the_other(tiny_encoder: Path, examples: Any) -> None:
    tokenizer = model_types.find("embeddings").load_tokenizer(tiny_encoder, 64)
    rows = srl.prompts(examples, tokenizer, STAGE, think=False).to_pylist()
    assert [unpack(row["token_ids"]).picked for row in rows] == [(), (0,), ()]
    assert [row["verifier"] for row in rows] == ["pick"] * 3
    assert srl.expert_actions(examples, tokenizer, STAGE) == {
        row["id"]: picks for row, picks in zip(rows, ([0], [1], [0]), strict=True)
    }
    solutions = sft.samples(examples, tokenizer, think=False)
    assert solutions["completion_ids"].to_pylist() == [[0, 1], [0]]


def test_a_cross_encoder_reads_the_question_with_each_candidate(tiny_encoder: Path, examples: Any) -> None:
    reranker = model_types.find("reranker")
    tokenizer = reranker.load_tokenizer(tiny_encoder, 64)
    question = unpack(reranker.encode_prompt(tokenizer, examples.to_pylist()[0], think=False))
    assert question.question == () and tokenizer.tokenizer.decode(question.candidates[0]) == "[CLS] a b [SEP] c [SEP]"


def test_questions_of_a_batch_share_candidates_and_keep_the_numbers_of_their_own(
    tiny_encoder: Path, examples: Any
) -> None:
    embeddings = model_types.find("embeddings")
    tokenizer = embeddings.load_tokenizer(tiny_encoder, 64)
    prompts = rlvr.prompts(examples, tokenizer, "rlvr", think=False)
    shared = embeddings.together(prompts, "token_ids")
    records.check("Prompt", shared)
    shown = [embeddings.show(tokenizer, tokens).splitlines() for tokens in shared["token_ids"].to_pylist()]
    assert shown == [["a b", "0: c", "1: d", "2: e"], ["x", "0: e", "1: c", "2: d"]]
    reranker = model_types.find("reranker")
    assert reranker.together(prompts, "token_ids") is prompts


def test_a_text_is_cut_to_the_context(tiny_encoder: Path) -> None:
    tokenizer = model_types.find("embeddings").load_tokenizer(tiny_encoder, 8)
    assert len(tokenizer.encode("a" * 100_000)) == 8
    longer = model_types.find("embeddings").load_tokenizer(tiny_encoder, 100_000)
    assert len(longer.encode("a" * 100_000)) == longer.tokenizer.model_max_length < 100_000


def test_embeddings_are_judged_over_the_whole_corpus_where_there_is_one(tiny_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(f'{{"doc_id": "d{i}", "text": "{"ab" * i}c"}}\n' for i in range(12)))
    (tmp_path / "queries_dev.jsonl").write_text('{"query": "ababc", "positives": ["d2"], "candidates": ["d2"]}\n')
    embeddings = model_types.find("embeddings")
    tokenizer, engine = embeddings.load_tokenizer(tiny_encoder, 64), RankingEngine(tiny_encoder, "bi", 4096)
    [found] = embeddings.over_corpus(engine, tokenizer, tmp_path, WHOLE) or []
    assert found["score"] == 1.0  # the very text
    assert json.loads(found["components"]) == {"ndcg@10": 1.0, "mrr@10": 1.0, "recall@10": 1.0, "recall@100": 1.0}
    assert embeddings.over_corpus(engine, tokenizer, tmp_path / "corpus.jsonl", WHOLE) is None


def test_the_hardest_candidates_are_wrong_ones_and_what_answers_stays(examples: Any) -> None:
    row = example("q", "a", "b", "c", "d", "e", gains='{"3": 2.0, "1": 1.0}', steps=("3", "1"))
    table = records.build("Example", [row])
    narrowed = model_types.find("embeddings").narrowed(table, {row["id"]: [4, 3, 0, 2, 1]}, 2).to_pylist()[0]
    assert narrowed["candidates"] == ["a", "b", "d", "e"] and narrowed["id"] == row["id"]
    assert narrowed["steps"] == ["2", "1"] and json.loads(narrowed["reference"]) == {"2": 2.0, "1": 1.0}


def test_costs_go_with_the_candidates_that_are_kept(examples: Any) -> None:
    row = example("q", "a", "b", "c", "d", gains='{"3": 1.0}', steps=("3",)) | {
        "metadata": '{"costs": {"0": 9, "1": 2}}'
    }
    table = records.build("Example", [row])
    [narrowed] = model_types.find("intent_router").narrowed(table, {row["id"]: [3, 1, 0, 2]}, 1).to_pylist()
    assert narrowed["candidates"] == ["b", "d"] and json.loads(narrowed["metadata"]) == {"costs": {"0": 2}}
