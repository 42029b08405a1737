"""A small base model that sees: a vision tower and a projector, newly drawn, in front of a language model.

Hugging Face's own classes (LLaVA over a SigLIP tower), so it is trained, saved and loaded as any downloaded one is. The
language model is one that is there, or a Llama of 4 million parameters, newly drawn, too. The tower learns from the
images of the run, and from images alone before it where they are given (`vision_tower`); `small_base` has the language
model that knows moves before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from srl_rlvr import images as encoded
from srl_rlvr import small_base, vision_tower
from srl_rlvr.errors import InputError
from srl_rlvr.examples import visual
from srl_rlvr.policies import base_models

IMAGE = "<image>"
PATCH = 8
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(
    folder: Path,
    *,
    language: Path | None = None,
    texts: Sequence[str] = (),
    image_size: int = 64,
    patch: int = PATCH,
    width: int = 192,
    layers: int = 4,
    seed: int = 0,
    images: Sequence[bytes] = (),
    epochs: int = 0,
    observe: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Write the model, its processor and its card to `folder`, in Hugging Face layout.

    An image is (image_size / patch)² tokens to the language model in the folder `language`; without one, a small
    Llama is drawn whose tokenizer is of `texts`. `width` and `layers` are the tower's. It has
    seen each of these encoded `images` in so many `epochs` before. The same seed gives the same.
    Raises InputError where `language` cannot be loaded, the patches do not fill the image, or there are fewer
    than two images to learn from.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    if image_size % patch or image_size < patch:
        raise InputError(f"image size {image_size} is no multiple of the patches' {patch} pixels")
    tokenizer, decoder = _language(language, texts, seed)
    torch.manual_seed(seed)
    network = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 32,
                image_size=image_size,
                patch_size=patch,
            ).to_dict()
            | {"vision_use_head": False},
            text_config=decoder.config.to_dict(),
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=(image_size // patch) ** 2,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            tie_word_embeddings=decoder.config.tie_word_embeddings,
        )
    )
    network.model.language_model.load_state_dict(decoder.model.state_dict())
    network.lm_head.load_state_dict(decoder.lm_head.state_dict())
    processor = _processor(tokenizer, image_size, patch)
    if epochs:
        shown = processor.image_processor([encoded.pixels(image) for image in images], return_tensors="pt")
        vision_tower.pretrain(
            network.model.vision_tower, shown["pixel_values"], epochs=epochs, seed=seed, observe=observe
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    network.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(folder)


def texts_of(paths: Sequence[Path]) -> list[str]:
    """Questions and answers of these train files."""
    tables = (visual.load(path, "train").select(["prompt", "steps"]) for path in paths)
    return [text for table in tables for row in table.to_pylist() for text in (row["prompt"], *row["steps"])]


def images_of(paths: Sequence[Path]) -> list[bytes]:
    """The images of these train files, each once."""
    tables = (visual.load(path, "train").select(["images"]) for path in paths)
    return list(dict.fromkeys(image for table in tables for row in table.to_pylist() for image in row["images"]))


def _language(language: Path | None, texts: Sequence[str], seed: int) -> tuple[Any, Any]:
    """(tokenizer, causal language model), both of them with a token for images."""
    if language is None:
        tokenizer = small_base.tokenizer_of(texts)
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
        return tokenizer, small_base.random_model(tokenizer, seed)
    tokenizer, decoder = base_models.load_tokenizer(language), base_models.load_model(language)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return tokenizer, decoder


def _processor(tokenizer: Any, image_size: int, patch: int) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    side = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        SiglipImageProcessorPil(size=side),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        chat_template=_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=0,
    )
