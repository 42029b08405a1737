"""An encoder gives the vectors that sentence-transformers gives for the same folder, whatever its files say."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.config import ModelEntry
from serve.replicas import Encoder
from srl_rlvr import model_types
from srl_rlvr.errors import InputError
from srl_rlvr.policies.questions import unpack
from srl_rlvr.policies.ranking import RankingPolicy

TEXTS = ["where is my card?", "a long text " * 9, "word " * 60, "x", "  two\nlines "]


def write(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (found | changes).items() if value is not None}))


def default_prompt(folder: Path) -> None:
    prompts = {"query": "query: ", "document": "passage: "}
    write(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="query")


def prompts_without_default(folder: Path) -> None:
    write(folder / "config_sentence_transformers.json", prompts={"query": "query: "}, default_prompt_name=None)


def prompt_that_is_not_in_the_mean(folder: Path) -> None:
    default_prompt(folder)
    write(folder / "1_Pooling" / "config.json", include_prompt=False)


def short(folder: Path) -> None:
    write(folder / "sentence_bert_config.json", max_seq_length=24)


def no_length(folder: Path) -> None:
    write(folder / "tokenizer_config.json", model_max_length=None, max_length=None)
    write(folder / "sentence_bert_config.json", max_seq_length=None)


def lower_case(folder: Path) -> None:
    write(folder / "sentence_bert_config.json", do_lower_case=True)


def plain(folder: Path) -> None:
    """A folder of transformers', without sentence-transformers' files."""
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink()


KINDS = [default_prompt, prompts_without_default, prompt_that_is_not_in_the_mean, short, no_length, lower_case, plain]


@pytest.fixture
def folder(tiny_encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))


def assert_serves_its_vectors(folder: Path, max_context: int | None = None) -> None:
    from sentence_transformers import SentenceTransformer

    (folder / "model_card.json").write_text(json.dumps({"name": "mine", "model_type": "embeddings"}))
    entry = ModelEntry(path=str(folder), name="mine", max_context=max_context)
    served, _ = asyncio.run(Encoder(entry).embed(TEXTS, None))
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(served, theirs, atol=1e-5)


@pytest.mark.parametrize("change", KINDS)
def test_served_vectors_are_those_of_sentence_transformers(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    assert_serves_its_vectors(folder)


@pytest.mark.parametrize("max_context", [16, 1024])
@pytest.mark.parametrize("change", KINDS)
def test_a_trained_encoder_is_saved_as_it_was_trained(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], max_context: int
) -> None:
    """Prompt and longest text are in its folder: training, the gateway and sentence-transformers read texts alike."""
    change(folder)
    kind = model_types.find("embeddings")
    tokenizer = kind.load_tokenizer(folder, max_context)
    saved = tmp_path / "saved"
    saved.mkdir()
    RankingPolicy(folder, kind="bi").save_model(saved, {})
    tokenizer.save_pretrained(saved)
    assert_serves_its_vectors(saved)
    again = kind.load_tokenizer(saved, 1024)
    assert again.encode_many([(text,) for text in TEXTS]) == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("change", [default_prompt, short, plain])
def test_a_cross_encoder_reads_pairs_as_sentence_transformers_does(
    folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    from sentence_transformers import CrossEncoder

    saved = tmp_path / "saved"
    CrossEncoder(str(folder), num_labels=1, device="cpu").save_pretrained(str(saved))
    if change is not plain:
        change(saved)
    tokenizer = model_types.find("reranker").load_tokenizer(saved, 1024)
    theirs = CrossEncoder(str(saved), device="cpu")
    prompt = theirs.prompts.get(theirs.default_prompt_name) if theirs.default_prompt_name else None
    for text in (*TEXTS, "a" * 900, "ab " * 300):
        for asked in ("where?", text):
            ids = theirs.preprocess([(asked, text)], prompt=prompt)["input_ids"][0].tolist()
            assert list(tokenizer.encode(asked, text)) == ids


def test_two_long_texts_are_a_pair_of_little_work(tiny_encoder: Path) -> None:
    """The tokenizer would make every pair of their pieces, and end for want of memory."""
    tokenizer = model_types.find("reranker").load_tokenizer(tiny_encoder, 1024)
    text = "word " * 100_000
    assert tokenizer.encode(text, text) == tokenizer.encode(text[:9000], text[:9000])


def test_a_classifier_of_several_labels_is_no_reranker(tiny_encoder: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(tiny_encoder), num_labels=3, device="cpu")
    encoder.save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="a classifier of 3 labels"):
        model_types.find("reranker").load_tokenizer(tmp_path, 64)


def test_an_encoder_of_another_form_is_refused(folder: Path) -> None:
    write(folder / "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 7}})
    with pytest.raises(InputError, match="reads texts in another form"):
        model_types.find("embeddings").load_tokenizer(folder, 64)


def test_a_question_among_those_of_a_batch_keeps_the_ranks_of_its_candidates() -> None:
    import pyarrow as pa

    from srl_rlvr.model_types.kinds.ranking import RankingType
    from srl_rlvr.policies.questions import Question, pack

    kind = RankingType(name="searches", metric="ndcg@10", kind="bi", shares_candidates=True)
    questions = [Question((1,), ((2,), (3,)), (1,), (4, 9)), Question((5,), ((6,),), (), (2,))]
    table = pa.table({"token_ids": pa.array([pack(q) for q in questions], pa.list_(pa.int32()))})
    found = [unpack(tokens) for tokens in kind.together(table, "token_ids")["token_ids"].to_pylist()]
    assert [(q.picked, q.ranks, len(q.candidates)) for q in found] == [((1,), (4, 9), 3), ((), (2,), 3)]
