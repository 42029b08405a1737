"""Embeddings: a text in, a vector out, judged by the order in which its vectors put documents. Saved as a
sentence-transformers model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from srl_rlvr import records
from srl_rlvr.errors import InputError
from srl_rlvr.examples import rankings
from srl_rlvr.examples.files import Reading
from srl_rlvr.model_types.kinds.ranking import CandidateTokenizer, RankingType
from srl_rlvr.verifiers.orderings import CUTOFF, ndcg

_DEPTH = 100  # of the ranking that recall is of


class EmbeddingsType(RankingType):
    shortens: ClassVar[bool] = True

    def over_corpus(
        self, engine: Any, tokenizer: CandidateTokenizer, path: Path, how: Reading
    ) -> list[dict[str, Any]] | None:
        """nDCG@10, reciprocal rank and recall of every dev query over all documents of the folder's corpus."""
        corpus = rankings.corpus_of(path, how.skip_bad)
        if corpus is None:
            return None
        queries = rankings.read_queries(path, "dev", corpus, how.limit, how.skip_bad)
        if not queries:
            raise InputError(f"{path}: its dev split holds no queries")
        scorer, number_of = engine.scorer, {doc_id: number for number, doc_id in enumerate(corpus)}
        documents = [tokenizer.encode(text) for text in corpus.values()]
        asked = [tokenizer.encode(question) for question, _ in queries]
        texts = sorted({*documents, *asked}, key=lambda text: (-len(text), text))
        row_of = {text: row for row, text in enumerate(texts)}
        vectors = scorer.encode(texts).cpu().numpy()
        scores = vectors[[row_of[text] for text in asked]] @ vectors[[row_of[text] for text in documents]].T
        predictions = []
        for (question, positives), of_documents in zip(queries, scores, strict=True):
            best = np.argsort(-of_documents, kind="stable")[:_DEPTH]
            gains = {number_of[doc_id]: gain for doc_id, gain in positives.items()}
            judged = ndcg(" ".join(map(str, best)), json.dumps(gains), {})
            components = dict(judged.components)
            for depth in (CUTOFF, _DEPTH):
                found = gains.keys() & set(best[:depth].tolist())
                components[f"recall@{depth}"] = len(found) / max(len(gains), 1)
            row = {"id": question, "outcome": records.SCORED, "score": judged.reward, "counts": True}
            predictions.append(row | {"components": json.dumps(components)})
        return predictions


TYPE = EmbeddingsType(name="embeddings", metric=f"ndcg@{CUTOFF}", kind="bi", shares_candidates=True)
