"""The intent router: a text in, one label out. A label is a text as well (its name, or its description), so that a new
one needs no training."""

from srl_rlvr.model_types.ranking import RankingType

TYPE = RankingType(name="intent_router", metric="accuracy", kind="bi", verifier="label")
