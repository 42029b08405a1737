from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from srl_rlvr import trained
from srl_rlvr.errors import InputError


def test_an_encoder_without_a_card_is_refused_with_what_to_do(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    with pytest.raises(InputError, match="encoder.*model_card.json"):
        trained.read(folder)
    (folder / "model_card.json").write_text(json.dumps({"model_type": "embeddings"}))
    assert trained.read(folder).model_type.name == "embeddings"


def test_a_model_without_a_card_that_writes_is_a_task_llm(tiny_model: Path) -> None:
    assert trained.read(tiny_model).model_type.name == "task_llm"
