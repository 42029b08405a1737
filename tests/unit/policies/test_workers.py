"""A group of workers does what one worker does: DDP and FSDP2 on gloo, two processes, the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import workers

from srl_rlvr import vision_base

pytestmark = pytest.mark.integration


def found(work: Callable[..., None], folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    """What one worker leaves, and what two do."""
    import torch
    from torch.multiprocessing.spawn import spawn

    results: list[dict[str, Any]] = []
    for world in (1, 2):
        out = folder / str(world)
        out.mkdir()
        if world == 1:
            work(0, world, *arguments, str(out))
        else:
            spawn(work, (world, *arguments, str(out)), nprocs=world)
        results.append(torch.load(out / "found.pt", weights_only=False))
    return results


@pytest.mark.parametrize("lora_rank", [0, 3], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_learn_what_one_does(tiny_model: Path, tmp_path: Path, strategy: str, lora_rank: int) -> None:
    import torch

    alone, group = found(workers.run, tmp_path, strategy, lora_rank, str(tiny_model))
    assert alone["resumed_is_uninterrupted"] and group["resumed_is_uninterrupted"]
    assert alone["refused"] == group["refused"]
    for one, two in zip(alone["metrics"], group["metrics"], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    for one, two in zip(alone["gradients"], group["gradients"], strict=True):
        for name, gradient in one.items():
            # Not a quotient: with B still zero, A's gradient is zero.
            off, size = float((two[name] - gradient).norm()), float(gradient.norm())
            assert off <= 1e-5 * size, f"{name}: off by {off:.2e} of {size:.2e}"
    torch.testing.assert_close(group["weights"], alone["weights"], rtol=0, atol=1e-6)
    for one, two in zip(alone["logprobs"], group["logprobs"], strict=True):
        np.testing.assert_allclose(two, one, atol=1e-4)
    saved = [tmp_path / str(world) / "model" / "model.safetensors" for world in (1, 2)]
    assert saved[0].stat().st_size == saved[1].stat().st_size


def test_two_workers_learn_to_see_as_one_does(tmp_path: Path) -> None:
    """Under DDP, with the vision base, whose tower has weights that no loss reaches."""
    model = tmp_path / "base"
    vision_base.build(model, texts=["one two", "yes no"], image_size=32, width=32, layers=1)
    alone, group = found(workers.see, tmp_path, str(model))
    for one, two in zip(alone["metrics"], group["metrics"], strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    for one, two in zip(alone["logprobs"], group["logprobs"], strict=True):
        np.testing.assert_allclose(two, one, atol=1e-4)


@pytest.mark.parametrize("strategies", [("ddp", "fsdp"), ("fsdp", "ddp")], ids="to ".join)
def test_a_checkpoint_of_one_strategy_is_read_by_the_other(
    tiny_model: Path, tmp_path: Path, strategies: tuple[str, str]
) -> None:
    import torch
    from torch.multiprocessing.spawn import spawn

    spawn(workers.hand_over, (2, strategies, str(tiny_model), str(tmp_path)), nprocs=2)
    saved, loaded = (torch.load(tmp_path / f"{when}.pt") for when in ("before", "after"))
    torch.testing.assert_close(loaded, saved, rtol=0, atol=1e-6)
