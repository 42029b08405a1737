from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a character tokenizer, in Hugging Face layout."""
    import tiny_model

    return tiny_model.write(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with a character tokenizer, as sentence-transformers saves it."""
    import tiny_encoder

    return tiny_encoder.write(tmp_path_factory.mktemp("encoders") / "tiny-encoder")
