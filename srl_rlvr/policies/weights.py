"""Weights on their way from learner to generators: one flat buffer, a manifest, a checksum."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash


@dataclass(frozen=True)
class Manifest:
    """What lies in the buffer: (name, shape) in order. `lora_scale` is set where the tensors are adapters."""

    version: int
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    checksum: str
    lora_scale: float | None = None


def share_storage(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Lay `parameters` into one flat float32 tensor, in order: they become views of it, and learn there."""
    kept = list(parameters)
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in kept])
    at = 0
    for parameter in kept:
        parameter.data = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    return flat


def write_state(state: dict[str, Any], file: Path) -> None:
    """What a policy goes on from. Raises OSError where it cannot be written."""
    try:
        torch.save(state, file)
    except RuntimeError as error:  # torch's writer: a full disk is no OSError to it
        raise OSError(f"{file}: {str(error).strip().splitlines()[0]}") from None


def flatten(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """All tensors as one float32 tensor [sum of sizes]: a copy."""
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])


def in_memory(flat: torch.Tensor, manifest: Manifest) -> tuple[np.ndarray, Manifest]:
    """The buffer as an array, and a manifest with the checksum of that array: a GPU's checksum is another.

    Raises ValueError if the copy from the GPU is not what the manifest says.
    """
    if not flat.is_cuda:
        return flat.numpy(), manifest
    flat = flat.cpu()
    copied = f"{weighted_sum(flat):016x}"
    if copied != manifest.checksum:
        raise ValueError(
            f"weights of version {manifest.version} left the GPU damaged: {copied} is not {manifest.checksum}"
        )
    return flat.numpy(), replace(manifest, checksum=checksum(flat))


def unflatten(buffer: np.ndarray | torch.Tensor, manifest: Manifest) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) views into `buffer`. Raises ValueError where the checksum does not match the manifest's."""
    with warnings.catch_warnings():  # Ray's buffers are read-only, and the views are only read
        warnings.filterwarnings("ignore", message=".* is not writable")
        flat = torch.as_tensor(buffer)
    found = checksum(flat)
    if found != manifest.checksum:
        raise ValueError(f"weights of version {manifest.version} arrived damaged: {found} is not {manifest.checksum}")
    at = 0
    for name, shape in manifest.tensors:
        size = math.prod(shape)
        yield name, flat[at : at + size].view(shape)
        at += size


def checksum(flat: torch.Tensor) -> str:
    """Of every bit of a float32 tensor, where it lies: xxh3 in memory, a position-weighted sum of words on a GPU."""
    if flat.device.type == "cpu":
        return xxhash.xxh3_128_hexdigest(flat.numpy().view(np.uint8).data)
    return f"{weighted_sum(flat):016x}"


def weighted_sum(flat: torch.Tensor, chunk: int = 1 << 24) -> int:
    """Σ word_i · (2i + 1) modulo 2^63 over the 32-bit words of `flat`: a word changed or moved changes it."""
    total = 0
    for start in range(0, len(flat), chunk):
        words = flat[start : start + chunk].view(torch.int32).long()
        odd = 2 * torch.arange(start, start + len(words), device=flat.device) + 1
        total += int((words * odd).sum())
    return total % (1 << 63)


def merge_lora(
    base: Iterable[tuple[str, torch.Tensor]], adapters: dict[str, torch.Tensor], scale: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """Base tensors with `scale · B·A` added where an adapter pair of that name exists (Hu et al. 2021, eq. 3)."""
    for name, tensor in base:
        down, up = adapters.get(f"{name}.lora_A"), adapters.get(f"{name}.lora_B")
        if down is not None and up is not None:
            tensor = torch.addmm(tensor.float(), up, down, alpha=scale)
        yield name, tensor
