"""A folder that is no model is one line, before anything is loaded."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models, chat


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refusal(base: str, cache: Path) -> str:
    with pytest.raises(InputError) as caught:
        base_models.resolve(base, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: cannot be read"):
        base_models.load_model(tmp_path)


def test_a_whole_folder_is_its_own_model(copy: Path) -> None:
    assert base_models.resolve(str(copy), copy / "cache") == copy.resolve()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("config.json", "config.json is missing"), ("tokenizer*", "no tokenizer in it"), ("*.safetensors", "no weights")],
)
def test_a_folder_that_lacks_a_part_says_which(copy: Path, pattern: str, expected: str) -> None:
    for path in copy.glob(pattern):
        path.unlink()
    assert expected in refusal(str(copy), copy / "cache")


def test_of_two_that_fill_the_cache_at_once_the_first_stays(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = base_models.WITH_VISION
    read = tmp_path / name / "read_by_another"
    monkeypatch.setattr(base_models, "_unpack", lambda base, cache: tiny_model)

    def build(folder: Path, language: Path) -> None:
        folder.mkdir()
        read.parent.mkdir()
        read.touch()

    monkeypatch.setattr("srl_rlvr.vision_base.build", build)
    assert base_models.resolve(name, tmp_path) == read.parent
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert read.exists()


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/at/all", "~nobody/model", "smollm", "a/b/c"])
def test_a_base_that_is_nothing_is_refused(base: str, tmp_path: Path) -> None:
    assert refusal(base, tmp_path).startswith(f"model '{base}': no such folder; give a folder, a Hugging Face id, or ")


def change_tokenizer(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_a_tokenizer_without_chat_template_is_refused(copy: Path) -> None:
    for path in copy.glob("*.jinja"):
        path.unlink()
    change_tokenizer(copy, chat_template=None)
    with pytest.raises(InputError, match="has no chat template"):
        base_models.load_tokenizer(copy)


def test_a_tokenizer_without_end_of_text_is_refused(copy: Path) -> None:
    change_tokenizer(copy, eos_token=None)
    with pytest.raises(InputError, match="names no end-of-text token"):
        base_models.load_tokenizer(copy)


def test_a_damaged_tokenizer_or_model_is_refused_in_one_line(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    (copy / "model.safetensors").write_bytes(b"damaged")
    for load, expected in (
        (base_models.load_tokenizer, "cannot load its tokenizer"),
        (base_models.load_model, "cannot load it as a causal language model"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            load(copy)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 24},
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"hidden_act": "nothing"},
        {"vocab_size": -1},
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_one_line(copy: Path, change: dict[str, object]) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="cannot load it as a causal language model: ") as caught:
        base_models.load_model(copy)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_there_are_not_drawn(copy: Path) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(InputError, match=r"its weights lack \d+ tensors of its config, as model.layers"):
        base_models.load_model(copy)


def test_a_card_is_read_where_there_is_one(copy: Path) -> None:
    assert base_models.read_card(copy) == {}
    (copy / "model_card.json").write_text('{"name": "mine"}')
    assert base_models.read_card(copy) == {"name": "mine"}
    for text, said in (("{", "cannot be read: "), ("[]", "it should be a JSON object")):
        (copy / "model_card.json").write_text(text)
        with pytest.raises(InputError, match=f"model_card.json: {said}"):
            base_models.read_card(copy)


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_an_encoder_learns_in_float32_however_it_was_saved(tiny_encoder: Path, tmp_path: Path, kind: str) -> None:
    import torch

    base_models.load_encoder(tiny_encoder, kind).to(torch.bfloat16).save_pretrained(str(tmp_path))
    loaded = base_models.load_encoder(tmp_path, kind)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, to: Path) -> None:
    """A repository with the files of `folder`; what is downloaded of it lies in `to`."""
    from huggingface_hub.utils import filter_repo_objects, validate_repo_id

    def download(base: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        validate_repo_id(base)
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, to / name)
        return str(to)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)


FILES = ["vocab.txt", "merges.txt", "vocab.json", "spiece.model", "source.spm", "bpe.codes", "1_Pooling/config.json",
         "2_Dense/pytorch_model.bin", "modules.json", "chat_template.jinja", "cl.tiktoken"]  # fmt: skip
NEEDLESS = ["onnx/model.onnx", "openvino/x.json", "original/params.json", "consolidated.safetensors", "tf_model.h5",
            "README.md"]  # fmt: skip


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_of_a_repository_comes_what_loading_needs(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    for name in (*FILES, *NEEDLESS):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("{}")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    if weights != "model.safetensors":
        (copy / "model.safetensors").unlink()
    hub(copy, monkeypatch, tmp_path / "downloaded")
    found = base_models.resolve("someone/model", tmp_path)
    names = {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()}
    assert names >= {*FILES, "config.json", "tokenizer.json", weights}
    assert not names & {*NEEDLESS, *({"model.safetensors", "pytorch_model.bin"} - {weights})}


def test_a_repository_is_held_to_what_a_folder_is(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "model.safetensors").unlink()
    hub(copy, monkeypatch, tmp_path / "downloaded")
    assert "no weights in it" in refusal("someone/model", tmp_path)


@pytest.mark.parametrize("base", ["someone/model:main", "someone/mo del", "someone/-model", "some..one/model"])
def test_what_is_no_hub_id_is_refused(base: str, tmp_path: Path) -> None:
    assert f"model '{base}': " in refusal(base, tmp_path)


def test_a_tokenizer_without_its_vocabulary_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    """transformers makes one of its special tokens alone, for which every word is unknown."""
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 30522}))
    with pytest.raises(InputError, match="its tokenizer knows 0 words, and the model 30522"):
        base_models.load_plain_tokenizer(folder)


def grow_tokenizer(folder: Path, template: str | None = None, **tokens: object) -> None:
    tokenizer = base_models.load_tokenizer(folder)
    tokenizer.add_special_tokens(tokens)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)


def test_a_token_that_the_embedding_has_no_row_for_is_named(copy: Path, tmp_path: Path) -> None:
    unused = Path(shutil.copytree(copy, tmp_path / "unused"))
    grow_tokenizer(unused, additional_special_tokens=["<|image|>"])
    tokenizer = base_models.load_tokenizer(unused)  # no prompt has it: in texts it is text
    assert max(chat.prompt_ids(tokenizer, [{"role": "user", "content": "<|image|>"}], False)) < 101
    grow_tokenizer(
        copy, "{% for m in messages %}{{ m['content'] }}{% endfor %}<|turn|>", additional_special_tokens=["<|turn|>"]
    )
    for load in (base_models.load_tokenizer, base_models.load_plain_tokenizer):
        with pytest.raises(InputError, match=r"'<\|turn\|>' of id 101, and the model's embedding 101 rows"):
            load(copy)


def sharded(folder: Path) -> list[Path]:
    model = base_models.load_model(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    return sorted(folder.glob("*.safetensors"))


def test_weights_in_parts_must_be_whole(copy: Path) -> None:
    parts = sharded(copy)
    assert base_models.resolve(str(copy), copy) == copy.resolve()
    index = copy / "model.safetensors.index.json"
    said = index.read_text()
    index.unlink()
    assert "model.safetensors.index.json" in refusal(str(copy), copy)
    index.write_text(said)
    parts[1].unlink()
    assert f"{parts[1].name} is missing" in refusal(str(copy), copy)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named(copy: Path, name: str) -> None:
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 538090408\n")
    assert f"{name} is a pointer of git-lfs" in refusal(str(copy), copy)


@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_weights_that_are_cut_off_are_named(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors cannot be read" in refusal(str(copy), copy)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["safetensors", "bfloat16", "pickled"])
def test_weights_that_are_not_finite_are_named(
    copy: Path, value: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_models, "_ROWS_AT_ONCE", 1000)
    path = copy / "model.safetensors"
    found = {name: t.bfloat16() if kind == "bfloat16" else t for name, t in load_file(path).items()}
    found["model.layers.1.mlp.down_proj.weight"][-1, -1] = value
    if kind == "pickled":
        path.unlink()
        torch.save(found, copy / "pytorch_model.bin")
    else:
        save_file(found, path)
    assert "model.layers.1.mlp.down_proj.weight in " in refusal(str(copy), copy)


def test_a_folder_of_adapters_is_named_with_its_base(copy: Path) -> None:
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    assert "only adapters (adapter_config.json) of someone/base" in refusal(str(copy), copy)
    (copy / "config.json").unlink()
    assert "only adapters (adapter_config.json) of someone/base" in refusal(str(copy), copy)
