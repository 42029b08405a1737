"""Embeddings: a text in, a vector out, judged by the order in which its vectors put documents. Saved as a
sentence-transformers model."""

from srl_rlvr.model_types.ranking import RankingType

TYPE = RankingType(name="embeddings", metric="ndcg@10", kind="bi", shares_candidates=True)
