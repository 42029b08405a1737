"""Images before text: what the policy and the engine compute is what the network computes by itself."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from srl_rlvr import images, model_types, records, small_base, vision_base
from srl_rlvr.engines import Completion, SamplingSpec
from srl_rlvr.engines.transformers_engine import TransformersEngine
from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.policies.text import TextPolicy
from srl_rlvr.policies.vision import _TAKEN

TYPE = model_types.find("multimodal_vision")
CONTEXT = 300


def picture(seed: int, size: tuple[int, int] = (40, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*reversed(size), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _smolvlm(folder: Path) -> None:
    """A tiny one of another architecture, as the hub has them: a connector that shuffles pixels, tags around images."""
    from transformers import Idefics3Processor, SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = small_base.tokenizer_of(["one two", "yes no"])
    tags = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags}, replace_extra_special_tokens=False)
    torch.manual_seed(0)
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SmolVLMConfig(
        text_config=text | {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    side = {"longest_edge": 32}
    Idefics3Processor(
        Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False),
        tokenizer,
        image_seq_len=4,
        chat_template=vision_base._TEMPLATE,
    ).save_pretrained(folder)


def _qwen(folder: Path) -> None:
    """A tiny one whose image tokens have positions of three axes, and as many tokens as its image is large."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = small_base.tokenizer_of(["one two", "yes no"])
    tags = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags}, replace_extra_special_tokens=False)
    ids = dict(zip(tags, tokenizer.convert_tokens_to_ids(tags), strict=True))
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "pad_token_id": 0}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    tower = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config=text | {"eos_token_id": tokenizer.eos_token_id, "rope_parameters": rope},
        vision_config=tower | {"patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    # Its processor wants torchvision, for videos: the prompts are written by hand here.
    tokenizer.save_pretrained(folder)
    side = {"shortest_edge": 64, "longest_edge": 4096}
    Qwen2VLImageProcessorPil(patch_size=4, size=side, temporal_patch_size=2, merge_size=2).save_pretrained(folder)


class _QwenTokenizer:
    """Of the folder that `_qwen` writes, what the tests need of a processor."""

    def __init__(self, folder: Path):
        self.plain, self.folder = base_models.load_plain_tokenizer(folder), folder
        self.encode = self.plain.encode

    def prompt(self, images_: list[bytes]) -> list[int]:
        shown = [images.pixels(image) for image in images_]
        grids = base_models.load_image_processor(self.folder)(images=shown, return_tensors="pt")["image_grid_thw"]
        places = ("<|vision_start|>" + "<|image_pad|>" * (int(grid.prod()) // 4) + "<|vision_end|>" for grid in grids)
        return self.plain.encode("".join(places) + "one two")

    def save_pretrained(self, folder: Path) -> None:
        for file in [*self.folder.glob("token*"), *self.folder.glob("*processor*"), *self.folder.glob("*.jinja")]:
            shutil.copy(file, folder)


BUILDERS = {"smolvlm": _smolvlm, "qwen": _qwen}


@pytest.fixture(scope="module", params=["llava", *BUILDERS])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / request.param
    if request.param == "llava":
        vision_base.build(folder, texts=["one two", "yes no"], image_size=32, width=32, layers=2)
    else:
        BUILDERS[request.param](folder)
    return folder


def _tokenizer(model: Path) -> Any:
    return _QwenTokenizer(model) if model.name == "qwen" else TYPE.load_tokenizer(model, CONTEXT)


def _asked(model: Path) -> tuple[list[list[int]], list[list[bytes]]]:
    """Prompts of one image, of two, and the same text with another image; the last goes on from the one before."""
    tokenizer = _tokenizer(model)
    shown = [[picture(0)], [picture(1), picture(2, (16, 60))], [picture(3)], [picture(3)]]
    if isinstance(tokenizer, _QwenTokenizer):
        prompts = [tokenizer.prompt(of) for of in shown]
    else:
        rows = [{"id": "x", "provenance": "", "prompt": "one two", "steps": [], "images": of} for of in shown]
        prompts = [TYPE.encode_prompt(tokenizer, row, think=False) for row in rows]
    prompts[3] = prompts[3] + tokenizer.encode("yes\n")
    return prompts, shown


def _samples(prompts: list[list[int]], shown: list[list[bytes]], groups: list[list[Completion]]) -> pa.Table:
    return records.build("Sample", [
        {
            "prompt_id": str(number), "sample_index": index, "trunk_id": str(min(number, 2)), "policy_version": 0,
            "prompt_ids": prompts[number], "images": shown[number], "completion_ids": completion.token_ids,
            "behavior_logprobs": completion.logprobs, "advantage": float(index) - 0.5,
        }
        for number, group in enumerate(groups) for index, completion in enumerate(group)
    ])  # fmt: skip


def _engine(model: Path) -> TransformersEngine:
    return TransformersEngine(model, max_running=8, max_context=CONTEXT, kv_cache_gib=0.05)


@torch.no_grad()
def _by_itself(model: Path, row: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities of the completion from the network's own forward on the whole sample."""
    network, processor = base_models.load_model(model), base_models.load_image_processor(model)
    prepared = processor(images=[images.pixels(image) for image in row["images"]], return_tensors="pt")
    taken = {name: prepared[name] for name in _TAKEN if name in prepared}
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    if "image_grid_thw" in taken:
        taken["mm_token_type_ids"] = (ids == network.config.image_token_id).int()
    logits = network(input_ids=ids, **taken).logits[0].log_softmax(-1)
    start = len(row["prompt_ids"])
    return logits[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]


def test_engine_and_policy_agree_with_the_network_itself(model: Path) -> None:
    prompts, shown = _asked(model)
    groups = _engine(model).sample(prompts, SamplingSpec(2, 1.0, 6), shown)
    samples = _samples(prompts, shown, groups)
    policy = TextPolicy(model)
    assert policy.shares_prefixes, policy.notices
    image_token = policy.network.config.image_token_id
    compared = 0
    for row, learned in zip(samples.to_pylist(), policy.logprobs(samples), strict=True):
        np.testing.assert_allclose(learned, row["behavior_logprobs"], atol=2e-5)
        if image_token not in row["completion_ids"]:  # which the network itself would take for an image
            np.testing.assert_allclose(learned, _by_itself(model, row), atol=2e-5)
            compared += 1
    assert compared >= 4


def test_the_image_is_what_the_answer_depends_on(model: Path) -> None:
    engine, (prompts, shown) = _engine(model), _asked(model)
    spec = SamplingSpec(1, 0.0, 4)
    found = [engine.sample([prompts[0]], spec, [[image]])[0][0].logprobs for image in (shown[0][0], shown[2][0])]
    assert found[0] != found[1]
    together = engine.sample([prompts[0], prompts[0]], spec, [shown[0], shown[2]])
    for alone, beside in zip(found, together, strict=True):
        np.testing.assert_allclose(alone, beside[0].logprobs, atol=2e-5)


def test_an_update_moves_tower_projector_and_decoder_and_is_served_and_saved(model: Path, tmp_path: Path) -> None:
    engine, (prompts, shown) = _engine(model), _asked(model)
    samples = _samples(prompts, shown, engine.sample(prompts, SamplingSpec(2, 1.0, 6), shown))
    policy = TextPolicy(model)
    policy.begin_stage(keep_reference=False)
    before = {name: p.detach().clone() for name, p in policy.network.named_parameters()}
    policy.update(samples, UpdateSpec("cross_entropy", 1e-3))
    moved = {name for name, p in policy.network.named_parameters() if not torch.equal(p, before[name])}
    for part in (r"vis", r"projector|connector|merger", r"(language|text)_model.layers.0"):
        assert any(re.search(part, name) for name in moved), part
    buffer, manifest = policy.export()
    engine.load(buffer.clone(), manifest)
    policy.save_model(tmp_path, {})
    _tokenizer(model).save_pretrained(tmp_path)
    spec = SamplingSpec(1, 0.0, 6)
    assert engine.sample(prompts, spec, shown) == _engine(tmp_path).sample(prompts, spec, shown)


def test_adapters_on_a_model_with_a_tower_are_served_as_they_are_learned(model: Path) -> None:
    engine, (prompts, shown) = _engine(model), _asked(model)
    samples = _samples(prompts, shown, engine.sample(prompts, SamplingSpec(2, 1.0, 6), shown))
    policy = TextPolicy(model, lora_rank=2)
    policy.begin_stage(keep_reference=False)
    policy.update(samples, UpdateSpec("cross_entropy", 1e-2))
    buffer, manifest = policy.export()
    engine.load(buffer.clone(), manifest)
    samples = _samples(prompts, shown, engine.sample(prompts, SamplingSpec(2, 1.0, 6), shown))
    for row, learned in zip(samples.to_pylist(), policy.logprobs(samples), strict=True):
        np.testing.assert_allclose(learned, row["behavior_logprobs"], atol=5e-5)


def test_places_that_do_not_fit_the_images_are_an_error(model: Path) -> None:
    prompts, shown = _asked(model)
    with pytest.raises(ValueError, match="1 images give .* states, and .* places are there"):
        _engine(model).sample([prompts[1]], SamplingSpec(1, 0.0, 2), [shown[0]])


def test_patches_that_do_not_fill_the_image_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image size 20 is no multiple of the patches' 8 pixels"):
        vision_base.build(tmp_path / "base", texts=["one two"], image_size=20)


def test_a_model_without_a_tower_takes_no_images(tiny_model: Path) -> None:
    engine = TransformersEngine(tiny_model, max_running=2, max_context=64, kv_cache_gib=0.05)
    with pytest.raises(InputError, match="takes no images"):
        engine.sample([[1, 2]], SamplingSpec(1, 0.0, 2), [[picture(0)]])
    with pytest.raises(InputError, match="cannot load its processor|takes no images"):
        TYPE.load_tokenizer(tiny_model, CONTEXT)


def test_a_tower_goes_in_front_of_a_language_model_that_is_there(tiny_model: Path, tmp_path: Path) -> None:
    vision_base.build(tmp_path / "both", language=tiny_model, image_size=32, width=32, layers=1)
    before = dict(base_models.load_model(tiny_model).model.named_parameters())
    both = base_models.load_model(tmp_path / "both").model.language_model
    for name, parameter in both.named_parameters():
        assert torch.equal(parameter[: len(before[name])], before[name]), name
    prompts, shown = _asked(tmp_path / "both")
    assert _engine(tmp_path / "both").sample(prompts[:1], SamplingSpec(1, 0.0, 2), shown[:1])
