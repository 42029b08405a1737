"""A vision tower that learns from images alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from srl_rlvr import vision_base, vision_tower
from srl_rlvr.cli import main
from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models


def tower() -> Any:
    torch.manual_seed(0)
    config = SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
                                image_size=16, patch_size=8)  # fmt: skip
    return SiglipVisionModel(config)


def pictures(count: int) -> torch.Tensor:
    """Each of four squares in a colour of its own."""
    colours = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return colours.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def told_apart(tower: Any, pixels: torch.Tensor) -> float:
    """The share of views that are nearest to the other view of their image."""
    torch.manual_seed(2)
    with torch.no_grad():
        one, other = (tower(pixel_values=vision_tower.view(pixels)).last_hidden_state.mean(1) for _ in range(2))
    nearest = torch.cdist(one, other).argmin(1)
    return (nearest == torch.arange(len(pixels))).float().mean().item()


def test_it_tells_images_apart_that_it_could_not_before() -> None:
    learner, pixels, losses = tower(), pictures(64), []
    before = told_apart(learner, pixels)
    vision_tower.pretrain(learner, pixels, epochs=120, observe=lambda epoch, loss: losses.append((epoch, loss)))
    assert [epoch for epoch, _ in losses] == list(range(1, 121))
    assert losses[-1][1] < losses[0][1] - 1
    assert told_apart(learner, pixels) > before + 0.2


def test_the_same_seed_gives_the_same_weights() -> None:
    towers = [tower() for _ in range(3)]
    for seed, learner in zip((0, 0, 1), towers, strict=True):
        vision_tower.pretrain(learner, pictures(8), epochs=2, seed=seed)
    first, again, other = (torch.cat([p.flatten() for p in learner.parameters()]) for learner in towers)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_batch_of_one_image_is_left_out() -> None:
    vision_tower.pretrain(tower(), pictures(vision_tower.BATCH + 1), epochs=1)


def test_one_image_is_too_few() -> None:
    with pytest.raises(InputError, match="from two or more, and the data has 1"):
        vision_tower.pretrain(tower(), pictures(1), epochs=1)


def test_a_view_keeps_shape_and_differs_from_image_to_image() -> None:
    same = pictures(1).repeat(3, 1, 1, 1)
    seen = vision_tower.view(same)
    assert seen.shape == same.shape
    assert not torch.allclose(seen[0], seen[1])


def test_a_base_has_a_tower_that_has_learned_and_all_else_as_drawn(tmp_path: Path) -> None:
    shown = [_encoded(picture) for picture in pictures(4)]
    settings: dict[str, Any] = {"texts": ["one two"], "image_size": 16, "width": 32, "layers": 1}
    vision_base.build(tmp_path / "drawn", **settings)
    vision_base.build(tmp_path / "learned", **settings, images=shown, epochs=1)
    drawn, learned = (dict(base_models.load_model(tmp_path / name).named_parameters()) for name in ("drawn", "learned"))
    changed = {name for name in drawn if not torch.equal(drawn[name], learned[name])}
    assert changed
    assert all("vision_tower" in name for name in changed)


def test_epochs_without_images_are_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["base", "build", "--epochs", "2", "--out", str(tmp_path / "base")])
    assert "--epochs is for a tower: name its images by --vision" in capsys.readouterr().err


def test_each_image_of_the_data_is_learned_from_once(tmp_path: Path) -> None:
    first, second = (_encoded(picture) for picture in pictures(2))
    rows = [{"images": images, "question": "?", "answer": "a"} for images in ([first, second], [first])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert vision_base.images_of([tmp_path]) == [first, second]


def _encoded(pixels: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(((pixels.numpy().transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
