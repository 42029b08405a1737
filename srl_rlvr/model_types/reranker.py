"""The reranker: a question and documents in, an order of them out, each document read together with the question.
Saved as a sentence-transformers cross-encoder."""

from srl_rlvr.model_types.kinds.ranking import RankingType

TYPE = RankingType(name="reranker", metric="ndcg@10", kind="cross", takes_order=True)
