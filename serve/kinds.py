"""Which known type a type of one's own is like: its endpoint answers for both, and the console has a form for it."""

from __future__ import annotations

from srl_rlvr import model_types
from srl_rlvr.model_types import ModelType

WITH_ENDPOINT = ("embeddings", "reranker", "intent_router", "srl_parser", "extractor", "multimodal_vision")


def kind_of(model_type: ModelType) -> str:
    """The known type with the same declaration (class, scorer, form of JSON); `task_llm` for other types of text, and
    an empty text if no endpoint can answer for it."""
    if model_type.name in WITH_ENDPOINT:
        return model_type.name
    shape = _shape(model_type)
    if found := next((name for name in WITH_ENDPOINT if _shape(model_types.find(name)) == shape), ""):
        return found
    if model_type.policy == "text":
        return "task_llm"
    return {"bi": "embeddings", "cross": "reranker"}.get(getattr(model_type, "kind", ""), "")


def _shape(model_type: ModelType) -> tuple[object, ...]:
    json_form = getattr(model_type, "verifier", "") if model_type.policy == "text" else ""
    return type(model_type), getattr(model_type, "kind", ""), json_form
