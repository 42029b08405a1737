"""Images in front of a language model: their features stand where a prompt's tokens have places for them.

The network is one of Hugging Face's own, in the style of LLaVA and Idefics: a vision tower, a projector, a decoder. Its
processor gives a prompt as many image tokens as its `get_image_features` gives states.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srl_rlvr import images
from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models


def reader_of(model: Path, network: Any) -> ImageReader | None:
    """None where the network takes no images."""
    return ImageReader(model, network) if hasattr(network.config, "vision_config") else None


class ImageReader:
    """Embeddings of tokens and images, and their positions. Raises InputError for networks whose deeper layers are
    given features, too."""

    def __init__(self, model: Path, network: Any):
        if getattr(network.config.vision_config, "deepstack_visual_indexes", None):
            raise InputError(
                f"model type '{network.config.model_type}' gives images to deeper layers, too; it cannot be trained "
                "here yet: use LLaVA, SmolVLM, Idefics 3, or Qwen2.5-VL"
            )
        self._processor = base_models.load_image_processor(model)
        # An update passes its trunks two or three times.
        self._prepared = functools.lru_cache(maxsize=4)(self._prepare)
        self._image_token = network.config.image_token_id
        # Of an image token in Qwen2-VL (2409.12191, section 2.1: M-RoPE).
        self.has_axes = hasattr(network.model, "get_rope_index")

    def positions(self, network: Any, token_ids: Sequence[int] | np.ndarray, shown: Sequence[bytes]) -> np.ndarray:
        """[3, N]: time, height and width of each token; of text the three are equal."""
        ids = torch.as_tensor(np.asarray(token_ids, dtype=np.int64))[None]
        is_image, grid = (ids == self._image_token).int(), None
        if shown:
            grid = self._prepared(tuple(shown))["image_grid_thw"]
            merged = network.config.vision_config.spatial_merge_size**2
            self._check_places(int(is_image.sum()), int(grid.prod(1).sum()) // merged, len(shown))
        return network.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grid)[0][:, 0].numpy()

    def embed(
        self, network: Any, token_ids_N: torch.Tensor, of_prompts_N: torch.Tensor, shown: Sequence[bytes]
    ) -> torch.Tensor:
        """[N, hidden]: image tokens of prompts become the features of the images `shown`, in order.

        Raises ValueError where the prompts have other than as many places.
        """
        inputs = {name: value.to(token_ids_N.device) for name, value in self._prepared(tuple(shown)).items()}
        found = network.get_image_features(**inputs, return_dict=True).pooler_output
        features = torch.cat(list(found))  # [Σ tokens, hidden]
        embeddings = network.get_input_embeddings()(token_ids_N)
        places = (token_ids_N == self._image_token) & of_prompts_N
        self._check_places(int(places.sum()), len(features), len(shown))
        return embeddings.masked_scatter(places[:, None], features.to(embeddings.dtype))

    @staticmethod
    def _check_places(places: int, states: int, shown: int) -> None:
        if places != states:
            raise ValueError(f"{shown} images give {states} states, and {places} places are there")

    def _prepare(self, shown: tuple[bytes, ...]) -> dict[str, torch.Tensor]:
        """What the tower takes."""
        found = self._processor(images=[images.pixels(data) for data in shown], return_tensors="pt")
        return {name: value for name, value in found.items() if name in _TAKEN}


_TAKEN = ("pixel_values", "pixel_attention_mask", "image_grid_thw")
