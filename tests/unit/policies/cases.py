"""Batches of random tokens in the shapes that training meets, and the tables that hold them."""

from __future__ import annotations

import io
import random
from typing import Any

import pyarrow as pa
from PIL import Image

from srl_rlvr import records

Sample = dict[str, Any]
VOCABULARY = 100


def tree(name: str, offsets: list[int], lengths: list[list[int]], seed: int) -> list[Sample]:
    """One trunk; at each of `offsets` a group of samples of the given completion lengths branches off."""
    rng = random.Random(seed)
    trunk = [rng.randrange(VOCABULARY) for _ in range(max(offsets))]
    return [
        {
            "name": name,
            "group": f"{name}:{offset}",
            "prompt": trunk[:offset],
            "completion": [rng.randrange(VOCABULARY) for _ in range(length)],
            # Around log(1/100), so that some importance weights are cut and some are not.
            "behavior": [rng.gauss(-4.8, 0.5) for _ in range(length)],
            "advantage": rng.choice([-1.5, -0.5, 0.75, 1.25]),
        }
        for offset, group in zip(offsets, lengths, strict=True)
        for length in group
    ]


BATCHES: dict[str, list[Sample]] = {
    "one sample": tree("a", [7], [[5]], 0),
    "one sample beside a group": [*tree("a", [7], [[5]], 8), *tree("b", [5], [[8, 2]], 9)],
    "completions of one token": tree("a", [4], [[1, 1, 3]], 1),
    "RLVR groups of uneven lengths": [*tree("a", [9], [[3, 11, 1, 6]], 2), *tree("b", [5], [[8, 2, 2, 9]], 3)],
    "SRL trees of many steps": [
        *tree("a", [5, 9, 16, 30], [[3, 7, 1], [4, 4, 2], [9, 1, 1], [2, 5, 8]], 4),
        *tree("b", [6, 7], [[6, 2, 3], [1, 4, 12]], 5),
    ],
    "steps that are not in the order of the trunk": [
        *reversed(tree("a", [5, 9, 16], [[3, 7], [4, 2], [9, 1]], 6)),
        *tree("b", [12], [[2, 5]], 7),
    ],
}  # fmt: skip


def seen(image_token: int, places: int) -> list[Sample]:
    """Two trees, each with an image of its own in front of its trunk."""
    found = []
    for number, samples in enumerate((tree("a", [7], [[5, 3]], 10), tree("b", [5, 9], [[8, 2], [4, 1]], 11))):
        buffer = io.BytesIO()
        Image.linear_gradient("L").rotate(90 * number).convert("RGB").save(buffer, "PNG")
        for sample in samples:
            prompt = [image_token] * places + sample["prompt"]
            found.append(sample | {"prompt": prompt, "images": [buffer.getvalue()]})
    return found


def table(samples: list[Sample]) -> pa.Table:
    return records.build(
        "Sample",
        [
            {
                "prompt_id": sample["group"],
                "sample_index": i,
                "trunk_id": sample["name"],
                "policy_version": 0,
                "prompt_ids": sample["prompt"],
                "completion_ids": sample["completion"],
                "behavior_logprobs": sample["behavior"],
                "advantage": sample["advantage"],
                "images": sample.get("images", []),
            }
            for i, sample in enumerate(samples)
        ],
    )
