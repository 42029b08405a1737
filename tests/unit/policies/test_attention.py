"""Every model learns what its samples teach alone, as prefix trees or as packed sequences; the policy says which."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import cases
import pytest
import reference
import torch
import transformers

from srl_rlvr.errors import InputError
from srl_rlvr.policies import attention, prefix_tree
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.policies.text import TextPolicy

TREE = cases.BATCHES["SRL trees of many steps"]
SIZES: dict[str, Any] = {
    "vocab_size": cases.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TREES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, every head its own keys": ("Llama", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
}
# Windows are shorter than the samples: a model that looked further would have other gradients.
SEQUENCES: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral": ("Mistral", {"sliding_window": 6}, "it has sliding-window attention"),
    "qwen2": (
        "Qwen2",
        {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
        "it has layers of sliding_attention",
    ),
    "gemma2": (
        "Gemma2",
        {"sliding_window": 128, "layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": None, "query_pre_attn_scalar": 8},
        "its attention has a 'softcap'",
    ),
    "gemma3": ("Gemma3Text", {"sliding_window": 6}, "it has layers of sliding_attention"),
}  # fmt: skip


def write(folder: Path, kind: str, changes: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def assert_update_of_the_samples_alone(policy: TextPolicy, folder: Path) -> None:
    options = UpdateSpec(loss="policy_gradient", learning_rate=0.0, temperature=0.8)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()
    metrics = policy.update(cases.table(TREE), options)
    loss = reference.step_loss(oracle, TREE, None, None, options)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    found = dict(policy.network.named_parameters())
    for name, parameter in oracle.named_parameters():
        gradient = found[name].grad
        assert gradient is not None and parameter.grad is not None, name
        off = float((gradient.double() - parameter.grad).norm() / parameter.grad.norm())
        assert off <= 1e-5, f"{name}: relative difference {off:.2e}"


@pytest.mark.parametrize("name", TREES)
def test_models_with_plain_attention_are_trained_as_prefix_trees(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, *TREES[name])
    policy = TextPolicy(folder, max_grad_norm=1e9)
    assert policy.notices == [] and policy.network.config._attn_implementation == attention.ATTENTION_NAME
    assert_update_of_the_samples_alone(policy, folder)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("name", SEQUENCES)
def test_models_with_other_attention_are_trained_as_sequences_and_that_is_said(
    name: str, activation_checkpointing: bool, tmp_path: Path
) -> None:
    kind, changes, reason = SEQUENCES[name]
    folder = write(tmp_path, kind, changes)
    policy = TextPolicy(
        folder, max_grad_norm=1e9, tokens_per_microbatch=90, activation_checkpointing=activation_checkpointing
    )
    assert len(policy.notices) == 1 and f"cannot be trained as prefix trees ({reason})" in policy.notices[0]
    assert_update_of_the_samples_alone(policy, folder)


def test_a_saved_model_keeps_its_own_attention(tmp_path: Path) -> None:
    policy = TextPolicy(write(tmp_path, "Mistral", {"sliding_window": 6}))
    before = policy.network.config._attn_implementation
    policy.save_model(tmp_path / "saved", {})
    assert policy.network.config._attn_implementation == before != attention.ATTENTION_NAME


def test_a_model_whose_hidden_states_on_a_tree_are_others_is_no_tree(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(*args: Any, **options: Any) -> Any:
        output, _ = attention.tree_attention(*args, **options)
        return output.roll(1, dims=1), None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, attention.ATTENTION_NAME, shifted)
    policy = TextPolicy(tiny_model)
    assert not policy.shares_prefixes and "hidden states on a tree" in policy.notices[0]


def test_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}
    torch.manual_seed(0)
    transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).save_pretrained(folder)
    with pytest.raises(InputError, match="model type 'mamba' mixes up sequences in one row") as caught:
        TextPolicy(folder)
    assert "\n" not in str(caught.value)


def forest(batch: str) -> prefix_tree.Forest:
    """The batch with its branches in one pack, or none where a sample stands alone."""
    return next(prefix_tree.plant(prefix_tree.build_trees(cases.table(cases.BATCHES[batch])), 1000))


def test_a_sample_alone_is_one_sequence_and_one_pass() -> None:
    (pack,) = forest("one sample").packs
    assert pack.layout.spans == (prefix_tree.Span(0, 7 + 5 - 1),)
    beside = forest("one sample beside a group")
    assert [len(pack.layout.spans) for pack in beside.packs] == [2, 2]


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("batch", cases.BATCHES)
def test_flex_attention_has_the_values_of_the_flash_kernels(batch: str, key_heads: int) -> None:
    planted = forest(batch)
    trunk_tokens = [0] + [planted.trunks.layout.tokens] * len(planted.branches)
    torch.manual_seed(0)
    for pack, trunk in zip(planted.packs, trunk_tokens, strict=True):
        query = torch.randn(1, 6, pack.layout.tokens, 16)
        key, value = torch.randn(2, 1, key_heads, pack.layout.tokens, 16)
        trunk_key, trunk_value = torch.randn(2, 1, key_heads, trunk, 16)
        inputs = query, key, value, trunk_key, trunk_value, pack.layout, 0.3
        with warnings.catch_warnings():  # uncompiled, it says that it is slow
            warnings.simplefilter("ignore")
            found = attention._flex_tree(*inputs)
        torch.testing.assert_close(found, attention._FlashTree.apply(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [name for name in cases.BATCHES if name != "one sample"])
def test_branches_have_the_gradients_of_softmax_over_what_each_token_may_see(batch: str) -> None:
    trunks, branches = (pack.layout for pack in forest(batch).packs)
    torch.manual_seed(0)
    sizes = ((4, branches.tokens), (2, branches.tokens), (2, branches.tokens), (2, trunks.tokens), (2, trunks.tokens))
    inputs = [torch.randn(1, heads, n, 8, dtype=torch.float64, requires_grad=True) for heads, n in sizes]
    query, key, value, trunk_key, trunk_value = inputs
    upstream = torch.randn_like(query)
    output = attention._FlashTree.apply(*inputs, branches, 0.3)
    found = torch.autograd.grad(output, inputs, upstream)
    sees = torch.zeros(branches.tokens, trunks.tokens + branches.tokens, dtype=torch.bool)
    for span in branches.spans:
        own = slice(trunks.tokens + span.start, trunks.tokens + span.stop)
        sees[span.start : span.stop, own] = torch.ones(span.stop - span.start, span.stop - span.start).tril().bool()
    for queries, shared in branches.looks:
        sees[queries.start : queries.stop, shared.start : shared.stop] = True
    keys = torch.cat([trunk_key, key], dim=2).repeat_interleave(2, dim=1)
    values = torch.cat([trunk_value, value], dim=2).repeat_interleave(2, dim=1)
    scores = (0.3 * query @ keys.transpose(2, 3)).masked_fill(~sees, float("-inf"))
    plain = scores.softmax(dim=3) @ values
    torch.testing.assert_close(output, plain)
    for one, two in zip(found, torch.autograd.grad(plain, inputs, upstream), strict=True):
        torch.testing.assert_close(one, two)
