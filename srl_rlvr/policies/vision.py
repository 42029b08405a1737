"""Images in front of a language model: their features stand where a prompt's tokens have places for them.

The network is one of Hugging Face's own, in the style of LLaVA and Idefics: a vision tower, a projector, a decoder. Its
processor gives a prompt as many image tokens as its `get_image_features` gives states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from srl_rlvr import images
from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models


def reader_of(model: Path, network: Any) -> ImageReader | None:
    """None where the network takes no images."""
    return ImageReader(model, network) if hasattr(network.config, "vision_config") else None


class ImageReader:
    """Embeddings of tokens and images. Raises InputError for networks whose positions are not one line."""

    def __init__(self, model: Path, network: Any):
        base = getattr(network, "model", network)
        if hasattr(base, "get_rope_index"):
            raise InputError(
                f"model type '{network.config.model_type}' gives image tokens positions of three axes; it cannot be "
                "trained here yet: use one in the style of LLaVA or Idefics"
            )
        self._processor = base_models.load_image_processor(model)
        self._image_token = network.config.image_token_id

    def embed(
        self, network: Any, token_ids_N: torch.Tensor, of_prompts_N: torch.Tensor, shown: Sequence[bytes]
    ) -> torch.Tensor:
        """[N, hidden]: image tokens of prompts become the features of the images `shown`, in order.

        Raises ValueError where the prompts have other than as many places.
        """
        prepared = self._processor(images=[images.pixels(data) for data in shown], return_tensors="pt")
        inputs = {name: value.to(token_ids_N.device) for name, value in prepared.items() if name in _TAKEN}
        found = network.get_image_features(**inputs, return_dict=True).pooler_output
        features = torch.cat(list(found))  # [Σ tokens, hidden]
        embeddings = network.get_input_embeddings()(token_ids_N)
        places = (token_ids_N == self._image_token) & of_prompts_N
        if int(places.sum()) != len(features):
            raise ValueError(
                f"{len(shown)} images give {len(features)} states, and {int(places.sum())} places are there"
            )
        return embeddings.masked_scatter(places[:, None], features.to(embeddings.dtype))


_TAKEN = ("pixel_values", "pixel_attention_mask", "image_sizes")
