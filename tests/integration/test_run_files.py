"""The run files that are ready: their data is read, and what they learn from fits their context."""

from __future__ import annotations

from pathlib import Path

import pytest

from srl_rlvr import config as configs
from srl_rlvr import model_types, pipeline
from srl_rlvr.cli import session
from srl_rlvr.examples import sources
from srl_rlvr.policies import base_models

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
RUNS = Path(__file__).parents[2] / "runs"


@pytest.mark.parametrize("file", sorted(RUNS.glob("*.toml")), ids=lambda file: file.stem)
def test_a_ready_run_file_has_problems_that_fit(file: Path) -> None:
    config = configs.load(file)
    if not all(Path(source.path).exists() for source in config.data):
        pytest.skip(f"{config.data[0].path} is not part of the repository")
    tables = sources.load_all(config.data, config.seed, config.model_type)
    model_type = model_types.find(config.model_type)
    if model_type.policy == "text" and file.stem != "multimodal_vision":  # encoders cut their texts; its base is built
        limit = config.model.max_context
        tokenizer = model_type.load_tokenizer(
            base_models.resolve(config.model.base or model_type.base, session.model_cache()), limit
        )
        train, *evaluated = tables
        tables = pipeline.fitting(train, evaluated, tokenizer, config, limit)
    train, dev, held_out = tables
    assert train.num_rows > 100 and dev.num_rows >= config.data[0].dev and held_out.num_rows >= 50
