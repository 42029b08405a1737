"""A folder that is no model is one line, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models


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
