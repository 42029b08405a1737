"""Weights on their way from learner to generators: one flat buffer, a manifest, a checksum."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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


def flatten(
    tensors: Iterable[tuple[str, torch.Tensor]], version: int, lora_scale: float | None = None
) -> tuple[np.ndarray, Manifest]:
    """All tensors as one float32 buffer [sum of sizes], and its manifest."""
    named = [(name, tensor.detach()) for name, tensor in tensors]
    buffer = np.empty(sum(tensor.numel() for _, tensor in named), dtype=np.float32)
    at = 0
    for _, tensor in named:
        end = at + tensor.numel()
        torch.from_numpy(buffer[at:end]).copy_(tensor.reshape(-1))
        at = end
    entries = tuple((name, tuple(tensor.shape)) for name, tensor in named)
    return buffer, Manifest(version, entries, checksum(buffer), lora_scale)


def unflatten(buffer: np.ndarray, manifest: Manifest) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) views into `buffer`. Raises ValueError where the checksum does not match the manifest's."""
    found = checksum(buffer)
    if found != manifest.checksum:
        raise ValueError(f"weights of version {manifest.version} arrived damaged: {found} is not {manifest.checksum}")
    with warnings.catch_warnings():  # Ray's buffers are read-only, and the views are only read
        warnings.filterwarnings("ignore", message=".* is not writable")
        flat = torch.from_numpy(buffer)
    at = 0
    for name, shape in manifest.tensors:
        size = int(np.prod(shape))
        yield name, flat[at : at + size].view(shape)
        at += size


def checksum(buffer: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(buffer.view(np.uint8).data)


def merge_lora(
    base: Iterable[tuple[str, torch.Tensor]], adapters: dict[str, torch.Tensor], scale: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """Base tensors with `scale · B·A` added where an adapter pair of that name exists (Hu et al. 2021, eq. 3)."""
    for name, tensor in base:
        down, up = adapters.get(f"{name}.lora_A"), adapters.get(f"{name}.lora_B")
        if down is not None and up is not None:
            tensor = tensor.float() + scale * (up @ down)
        yield name, tensor
