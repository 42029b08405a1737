from __future__ import annotations

from typing import Any

import pytest

from serve.kinds import kind_of
from srl_rlvr import model_types
from srl_rlvr.model_types.intent_router import RouterType
from srl_rlvr.model_types.kinds.ranking import RankingType
from srl_rlvr.model_types.kinds.text import StructuredType, TextType
from srl_rlvr.model_types.multimodal_vision import VisionType


@pytest.mark.parametrize("name", model_types.names())
def test_a_known_type_is_of_its_own_kind(name: str) -> None:
    assert kind_of(model_types.find(name)) == name


TEXT: Any = {"name": "mine", "metric": "m", "instruction": "i"}
RANKING: Any = {"name": "mine", "metric": "m"}


@pytest.mark.parametrize(
    ("mine", "kind"),
    [
        (TextType(**TEXT), "task_llm"),
        (StructuredType(**TEXT), "extractor"),
        (StructuredType(**TEXT, verifier="frames"), "srl_parser"),
        (VisionType(**TEXT), "multimodal_vision"),
        (RouterType(**RANKING, kind="bi", verifier="label"), "intent_router"),
        (RankingType(**RANKING, kind="bi"), "embeddings"),
        (RankingType(**RANKING, kind="cross"), "reranker"),
    ],
)
def test_a_type_of_ones_own_is_of_the_kind_that_it_is_like(mine: Any, kind: str) -> None:
    assert kind_of(mine) == kind
