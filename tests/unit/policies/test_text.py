"""TextPolicy: its updates against the plain reference, and what it saves, exports and refuses."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pyarrow as pa
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from srl_rlvr.errors import InputError
from srl_rlvr.policies import attention, prefix_tree, text, weights
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.policies.text import TextPolicy

Oracle = Callable[[int], Any]
RANK = 3
TREE = cases.BATCHES["SRL trees of many steps"]


def spec(**changes: Any) -> UpdateSpec:
    return UpdateSpec(**({"loss": "policy_gradient", "learning_rate": 0.0} | changes))


def make_policy(model: Path, rank: int = 0, **changes: Any) -> TextPolicy:
    return TextPolicy(model, **({"lora_rank": rank, "lora_alpha": 16.0, "max_grad_norm": 1e9} | changes))


def policy_like(model: Path, oracle: Any, rank: int, **changes: Any) -> TextPolicy:
    policy = make_policy(model, rank, **changes)
    policy.network.load_state_dict({name: tensor.float() for name, tensor in oracle.state_dict().items()})
    return policy


def trained(network: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def copies(network: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def assert_same_gradients(policy: TextPolicy, oracle: Any, limit: float = 1e-5) -> None:
    found = trained(policy.network)
    for name, parameter in trained(oracle).items():
        gradient = found[name].grad
        assert gradient is not None and parameter.grad is not None, name
        off = float((gradient.double() - parameter.grad).norm() / parameter.grad.norm())
        assert off <= limit, f"{name}: relative difference {off:.2e}"


def assert_same_weights(first: Any, second: Any) -> None:
    found = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, found[name]), name


def oracle_values(oracle: Any, samples: list[cases.Sample], temperature: float) -> list[list[float]]:
    with torch.no_grad():
        return [[float(value) for value in reference.logprobs(oracle, sample, temperature)] for sample in samples]


@pytest.mark.parametrize("rank", [0, RANK], ids=["full", "lora"])
@pytest.mark.parametrize("budget", [1024, 16], ids=["one pack", "several packs"])
def test_the_preference_update_has_the_loss_and_gradients_of_the_plain_reference(
    tiny_model: Path, oracle_model: Oracle, budget: int, rank: int
) -> None:
    samples = [
        *cases.tree("a", [9], [[5, 3]], 1),
        *cases.tree("b", [6], [[2, 8]], 2),
        *cases.tree("c", [4], [[1, 1]], 3),
    ]
    pairs = [(samples[i], samples[i + 1]) for i in (0, 2, 4)]
    options = spec(loss="preference", beta=0.5)
    before, oracle = oracle_model(rank), oracle_model(rank)
    policy = policy_like(tiny_model, before, rank, tokens_per_microbatch=budget)
    policy.begin_stage(keep_reference=True)
    torch.manual_seed(3)
    now = dict(policy.network.named_parameters())
    with torch.no_grad():
        for name, parameter in trained(oracle).items():
            parameter.copy_((parameter + 0.05 * torch.randn_like(parameter)).float())
            now[name].copy_(parameter)
    metrics = policy.update(cases.table(samples), options)
    loss = reference.preference_loss(oracle, before, pairs, options)
    loss.backward()
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_same_gradients(policy, oracle)


def test_preference_without_a_reference_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="needs a reference"):
        make_policy(tiny_model).update(cases.table(cases.tree("a", [9], [[5, 3]], 1)), spec(loss="preference"))


@pytest.mark.parametrize("rank", [0, RANK], ids=["full", "lora"])
@pytest.mark.parametrize("budget", [1024, 16], ids=["one pack", "several packs"])
@pytest.mark.parametrize("batch", cases.BATCHES)
def test_the_update_has_the_loss_and_gradients_of_the_plain_reference(
    tiny_model: Path, oracle_model: Oracle, batch: str, budget: int, rank: int
) -> None:
    samples, options = cases.BATCHES[batch], spec(temperature=0.8)
    oracle = oracle_model(rank)
    policy = policy_like(tiny_model, oracle, rank, tokens_per_microbatch=budget)
    metrics = policy.update(cases.table(samples), options)
    loss = reference.step_loss(oracle, samples, None, None, options)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert_same_gradients(policy, oracle)


@pytest.mark.parametrize("constant_length", [0, 24], ids=["by tokens", "dr_grpo, by a constant length"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("loss", ["policy_gradient", "cross_entropy"])
def test_every_form_of_the_loss_agrees_with_the_reference(
    tiny_model: Path, oracle_model: Oracle, loss: str, kl: float, constant_length: int
) -> None:
    options = spec(loss=loss, kl=kl, constant_length=constant_length, temperature=1.3)
    oracle = oracle_model(0)
    policy = policy_like(tiny_model, oracle, 0, tokens_per_microbatch=40)
    policy.begin_stage(keep_reference=kl > 0)
    fixed = oracle_values(oracle, TREE, options.temperature) if kl else None
    move(policy.network, oracle)
    metrics = policy.update(cases.table(TREE), options)
    expected = reference.step_loss(oracle, TREE, None, fixed, options)
    expected.backward()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(policy, oracle)
    if kl and loss == "policy_gradient":
        assert metrics["kl"] > 0.01


@pytest.mark.parametrize("rank", [0, RANK], ids=["full", "lora"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_later_minibatches_are_clipped_against_the_policy_at_the_start_of_the_batch(
    tiny_model: Path, oracle_model: Oracle, kl: float, rank: int
) -> None:
    options = spec(learning_rate=0.02, updates=2, kl=kl, temperature=0.9)
    oracle = oracle_model(rank)
    policy = policy_like(tiny_model, oracle, rank, tokens_per_microbatch=30)
    policy.begin_stage(keep_reference=kl > 0)
    names = list(dict.fromkeys(sample["name"] for sample in TREE))
    minibatches = [[sample for sample in TREE if sample["name"] == name] for name in names]
    old = [oracle_values(oracle, minibatch, 0.9) for minibatch in minibatches]
    optimizer = torch.optim.AdamW(trained(oracle).values(), lr=0.02, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for minibatch, before in zip(minibatches, old, strict=True):
        optimizer.zero_grad()
        losses.append(reference.step_loss(oracle, minibatch, before, before if kl else None, options))
        losses[-1].backward()
        if minibatch is not minibatches[-1]:
            optimizer.step()
    metrics = policy.update(cases.table(TREE), options)
    assert metrics["clip_fraction"] > 0.01
    assert metrics["loss"] == pytest.approx(sum(loss.item() for loss in losses) / len(losses), rel=1e-4)
    # Looser than after one step: AdamW's first step is the sign of the gradient, whatever its rounding.
    assert_same_gradients(policy, oracle, limit=2e-3)


@pytest.mark.parametrize("rank", [0, RANK], ids=["full", "lora"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_clipped_tokens_have_the_gradients_of_the_plain_reference(
    tiny_model: Path, oracle_model: Oracle, kl: float, rank: int
) -> None:
    options = spec(kl=kl, temperature=0.9, constant_length=12)
    oracle, samples = oracle_model(rank), cases.table(TREE)
    policy = policy_like(tiny_model, oracle, rank, tokens_per_microbatch=30)
    policy.begin_stage(keep_reference=kl > 0)
    old = oracle_values(oracle, TREE, 0.9)
    move(policy.network, oracle)
    columns = text._token_columns(samples)
    old_float32 = [np.array(values, dtype=np.float32) for values in old]
    metrics = policy._step(prefix_tree.build_trees(samples), columns, old_float32, options)
    expected = reference.step_loss(oracle, TREE, old, old if kl else None, options)
    expected.backward()
    assert metrics["clip_fraction"] > 0.05
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(policy, oracle)


def move(network: Any, oracle: Any) -> None:
    """What is trained of both models moves a little from where it is, to the same float32 values."""
    torch.manual_seed(3)
    with torch.no_grad():
        for ours, theirs in zip(trained(network).values(), trained(oracle).values(), strict=True):
            ours.add_(torch.randn_like(ours) * 0.02)
            theirs.copy_(ours)


@pytest.mark.parametrize("budget", [1024, 30], ids=["one pack", "several packs"])
@pytest.mark.parametrize("batch", cases.BATCHES)
def test_completion_logprobs_are_those_of_the_models_own_forward_pass(
    tiny_model: Path, oracle_model: Oracle, batch: str, budget: int
) -> None:
    samples = cases.BATCHES[batch]
    found = make_policy(tiny_model, tokens_per_microbatch=budget).logprobs(cases.table(samples), 0.7)
    expected = oracle_values(oracle_model(0), samples, 0.7)
    assert [len(row) for row in found] == [len(sample["completion"]) for sample in samples]
    for row, values in zip(found, expected, strict=True):
        np.testing.assert_allclose(row, values, atol=2e-5)


def test_the_order_of_samples_does_not_matter(tiny_model: Path) -> None:
    shuffled = [TREE[i] for i in np.random.default_rng(0).permutation(len(TREE))]
    first, second = make_policy(tiny_model), make_policy(tiny_model)
    first.update(cases.table(TREE), spec())
    second.update(cases.table(shuffled), spec())
    for name, parameter in trained(first.network).items():
        torch.testing.assert_close(trained(second.network)[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_only_the_sample_with_an_advantage_moves_the_weights(tiny_model: Path, oracle_model: Oracle) -> None:
    samples = [sample | {"advantage": 0.0} for sample in TREE]
    samples[4]["advantage"] = 2.0
    policy, oracle = make_policy(tiny_model), oracle_model(0)
    policy.update(cases.table(samples), spec(constant_length=10))
    alone = reference.step_loss(oracle, [samples[4]], None, None, spec(constant_length=10)) / len(samples)
    alone.backward()
    assert_same_gradients(policy, oracle)


def test_a_prompt_that_is_no_prefix_of_its_trunk_is_refused(tiny_model: Path) -> None:
    samples = copy.deepcopy(TREE)
    samples[1]["prompt"][2] += 1
    with pytest.raises(ValueError, match="sample 1: its prompt is not a prefix of trunk a"):
        make_policy(tiny_model).update(cases.table(samples), spec())


@pytest.mark.parametrize("side", ["prompt", "completion"])
def test_a_sample_without_prompt_or_completion_is_refused(tiny_model: Path, side: str) -> None:
    sample = cases.BATCHES["one sample"][0] | {side: []} | ({"behavior": []} if side == "completion" else {})
    with pytest.raises(ValueError, match="must not be empty"):
        make_policy(tiny_model).update(cases.table([sample]), spec())


def test_packs_keep_to_the_budget_and_hold_every_branch_once(tiny_model: Path) -> None:
    samples = cases.table(TREE)
    forests = list(prefix_tree.plant(prefix_tree.build_trees(samples), 25))
    packs = [pack for forest in forests for pack in forest.packs]
    assert len(forests) == 2 and len(packs) > 4
    assert all(len(pack.token_ids) <= 25 or len(pack.layout.spans) == 1 for pack in packs)
    rows, indices = (torch.cat([getattr(pack, name) for pack in packs]) for name in ("token_rows", "token_indices"))
    places = sorted(zip(rows.tolist(), indices.tolist(), strict=True))
    assert places == [(row, i) for row, sample in enumerate(TREE) for i in range(len(sample["completion"]))]


@pytest.mark.parametrize("budget", [16, 1024])
def test_a_trunk_is_computed_once_however_many_packs_its_branches_take(budget: int) -> None:
    forests = prefix_tree.plant(prefix_tree.build_trees(cases.table(TREE)), budget)
    trunks = {sample["name"]: 0 for sample in TREE}
    for sample in TREE:
        trunks[sample["name"]] = max(trunks[sample["name"]], len(sample["prompt"]))
    fed_in = sum(trunks.values()) + sum(len(sample["completion"]) - 1 for sample in TREE)
    assert sum(len(pack.token_ids) for forest in forests for pack in forest.packs) == fed_in


def test_a_slice_of_a_table_is_read_from_its_own_rows(tiny_model: Path) -> None:
    whole, part = make_policy(tiny_model), make_policy(tiny_model)
    one = whole.update(cases.table(TREE[5:9]), spec())
    two = part.update(cases.table(TREE).slice(5, 4), spec())
    assert one == two


@pytest.mark.parametrize("rank", [0, RANK], ids=["full", "lora"])
def test_an_update_after_save_and_load_is_bit_for_bit_the_uninterrupted_one(
    tiny_model: Path, tmp_path: Path, rank: int
) -> None:
    options = spec(learning_rate=0.01, kl=0.1)
    policy = make_policy(tiny_model, rank, weight_decay=0.01)
    policy.begin_stage(keep_reference=True)
    policy.update(cases.table(TREE), options)
    policy.save(tmp_path)
    resumed = make_policy(tiny_model, rank, weight_decay=0.01, seed=99)
    resumed.load(tmp_path)
    assert resumed.version == 1
    for batch in (TREE, cases.BATCHES["one sample"], TREE):
        assert policy.update(cases.table(batch), options) == resumed.update(cases.table(batch), options)
    assert_same_weights(policy.network, resumed.network)


def test_a_new_stage_forgets_the_optimizer_and_the_reference(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    policy.begin_stage(keep_reference=True)
    policy.update(cases.table(TREE), spec(learning_rate=0.01, kl=0.1))
    policy.begin_stage(keep_reference=False)
    assert not policy.optimizer.state_dict()["state"] and policy.reference is None
    with pytest.raises(ValueError, match="kept no reference"):
        policy.update(cases.table(TREE), spec(kl=0.1))


def test_computing_the_reference_leaves_the_weights_in_place(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    policy.begin_stage(keep_reference=True)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(0.01)
    before = copies(policy.network)
    policy.update(cases.table(TREE), spec(kl=0.1))
    assert all(torch.equal(before[name], p) for name, p in policy.network.named_parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_and_moves_nothing(tiny_model: Path, bad: float) -> None:
    policy = make_policy(tiny_model)
    before = copies(policy.network)
    samples = [*TREE[:3], TREE[3] | {"advantage": bad}]
    with pytest.raises(ValueError, match="of version 0 is .*; lower the learning rate") as caught:
        policy.update(cases.table(samples), spec(learning_rate=0.1))
    assert "\n" not in str(caught.value)
    assert policy.version == 0
    assert all(torch.equal(before[name], p) for name, p in policy.network.named_parameters())


def test_a_gradient_that_is_not_finite_is_refused_and_moves_nothing(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    before = copies(policy.network)
    policy.network.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ValueError, match="the grad_norm of version 0 is (inf|nan)"):
        policy.update(cases.table(TREE), spec(learning_rate=0.1))
    assert all(torch.equal(before[name], p) for name, p in policy.network.named_parameters())


def test_gradients_are_scaled_down_to_the_norm(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, max_grad_norm=1e-3)
    metrics = policy.update(cases.table(TREE), spec())
    norm = torch.stack([p.grad.norm() for p in policy.network.parameters()]).norm()
    assert metrics["grad_norm"] > 1e-2 and float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_divergence_is_zero_where_engine_and_learner_agree(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    values = policy.logprobs(cases.table(TREE), 0.9)
    agreed = [sample | {"behavior": row.tolist()} for sample, row in zip(TREE, values, strict=True)]
    assert policy.update(cases.table(agreed), spec(temperature=0.9))["divergence"] == pytest.approx(0, abs=1e-6)
    assert policy.update(cases.table(TREE), spec(temperature=0.9))["divergence"] > 0.01


def test_what_no_engine_drew_weighs_as_if_the_policy_had_drawn_it(tiny_model: Path) -> None:
    policy, other = make_policy(tiny_model), make_policy(tiny_model)
    values = policy.logprobs(cases.table(TREE), 0.9)
    drawn = [sample | {"behavior": row.tolist()} for sample, row in zip(TREE, values, strict=True)]
    experts = [sample | {"behavior": [math.nan] * len(sample["behavior"])} for sample in TREE]
    expected = policy.update(cases.table(drawn), spec(temperature=0.9))
    found = other.update(cases.table(experts), spec(temperature=0.9))
    assert found["divergence"] == found["entropy"] == 0.0
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("rank", [0, RANK], ids=["full", "lora"])
def test_an_export_arrives_as_it_left(tiny_model: Path, rank: int) -> None:
    policy = make_policy(tiny_model, rank)
    policy.update(cases.table(TREE), spec(learning_rate=0.01))
    buffer, manifest = policy.export()
    arrived = dict(weights.unflatten(buffer, manifest))
    assert manifest.version == 1
    for name, tensor in trained(policy.network).items():
        plain = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".weight.lora_A")
        assert torch.equal(arrived.pop(plain.replace(".lora_B.default.weight", ".weight.lora_B")), tensor)
    assert not arrived


def test_a_read_only_buffer_is_read_without_a_warning(tiny_model: Path, recwarn: pytest.WarningsRecorder) -> None:
    flat, manifest = make_policy(tiny_model).export()
    buffer = flat.numpy()
    buffer.flags.writeable = False  # as Ray's object store hands it out
    assert len(dict(weights.unflatten(buffer, manifest))) == len(manifest.tensors)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


@pytest.mark.parametrize("rank", [0, RANK], ids=["full", "lora"])
def test_an_export_is_no_copy_and_follows_the_policy(tiny_model: Path, rank: int) -> None:
    policy = make_policy(tiny_model, rank)
    first, _ = policy.export()
    before = first.clone()
    policy.update(cases.table(TREE), spec(learning_rate=0.01))
    second, _ = policy.export()
    assert second.data_ptr() == first.data_ptr() and not torch.equal(second, before)


def test_the_checksum_on_a_gpu_sees_words_that_change_or_move() -> None:
    flat = torch.randn(1000)
    changed, moved = flat.clone(), flat.clone()
    changed[17] = torch.nextafter(changed[17], torch.tensor(9.0))
    moved[[3, 4]] = moved[[4, 3]]
    sums = [weights.weighted_sum(each, chunk) for each in (flat, changed, moved) for chunk in (64, 4096)]
    assert sums[0] == sums[1] and len(set(sums)) == 3


def test_a_damaged_export_is_refused(tiny_model: Path) -> None:
    buffer, manifest = make_policy(tiny_model).export()
    buffer[12345] += 1e-3
    with pytest.raises(ValueError, match="weights of version 0 arrived damaged"):
        list(weights.unflatten(buffer, manifest))


def test_merged_adapters_are_pefts_own_merge(tiny_model: Path, oracle_model: Oracle) -> None:
    oracle = oracle_model(RANK)
    policy = policy_like(tiny_model, oracle, RANK)
    buffer, manifest = policy.export()
    base = dict(make_policy(tiny_model).network.named_parameters())
    assert manifest.lora_scale is not None
    merged = dict(weights.merge_lora(base.items(), dict(weights.unflatten(buffer, manifest)), manifest.lora_scale))
    for name, expected in oracle.merge_and_unload().named_parameters():
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, RANK], ids=["full", "lora"])
def test_a_saved_model_is_read_by_transformers_with_the_same_logits(
    tiny_model: Path, oracle_model: Oracle, tmp_path: Path, rank: int
) -> None:
    from transformers import AutoModelForCausalLM

    policy = policy_like(tiny_model, oracle_model(rank), rank)
    policy.update(cases.table(TREE), spec(learning_rate=0.01))
    policy.save_model(tmp_path, {"name": "saved"})
    ids = torch.tensor([TREE[-1]["prompt"]])
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert type(reloaded).__name__ == "LlamaForCausalLM" and reloaded.config._attn_implementation == "sdpa"
        torch.testing.assert_close(reloaded(ids).logits, policy.network(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert '"name": "saved"' in (tmp_path / "model_card.json").read_text()
    assert attention.ATTENTION_NAME not in (tmp_path / "config.json").read_text()


def test_adapters_are_saved_beside_the_model_as_peft_reads_them(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = make_policy(tiny_model, RANK)
    policy.update(cases.table(TREE), spec(learning_rate=0.01))
    policy.save_model(tmp_path, {"base": "tiny"})
    ids = torch.tensor([TREE[-1]["prompt"]])
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    assert str(tiny_model) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_training_goes_on_after_the_model_was_saved(tiny_model: Path, tmp_path: Path) -> None:
    saved, plain = make_policy(tiny_model), make_policy(tiny_model)
    saved.save_model(tmp_path, {})
    assert saved.update(cases.table(TREE), spec()) == plain.update(cases.table(TREE), spec())


def test_a_checkpoint_that_cannot_be_written_is_an_os_error_in_one_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing\nframes")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="learner.pt: .*failed writing") as caught:
        make_policy(tiny_model).save(tmp_path)
    assert "\n" not in str(caught.value)


def test_lora_leaves_the_base_weights_alone(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, RANK)
    before = copies(policy.network)
    policy.update(cases.table(TREE), spec(learning_rate=0.01))
    for name, parameter in policy.network.named_parameters():
        assert torch.equal(before[name], parameter) != (".lora_B" in name), name


def test_unused_budget_and_seed_do_not_change_the_update(tiny_model: Path) -> None:
    results = [
        make_policy(tiny_model, tokens_per_microbatch=budget, seed=seed).update(cases.table(TREE), spec())["grad_norm"]
        for budget, seed in itertools.product((512, 4096), (0, 1))
    ]
    assert len(set(results)) == 1


@pytest.mark.parametrize("rank", [0, RANK], ids=["full", "lora"])
def test_activation_checkpointing_keeps_less_and_gives_the_same_gradients(tiny_model: Path, rank: int) -> None:
    gradients, kept = [], []
    for activation_checkpointing in (False, True):
        policy = make_policy(tiny_model, rank, activation_checkpointing=activation_checkpointing)
        policy.begin_stage(keep_reference=True)
        numbers: list[int] = []

        def note(tensor: torch.Tensor, numbers: list[int] = numbers) -> torch.Tensor:
            numbers.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            policy.update(cases.table(TREE), spec(kl=0.3))
        gradients.append({name: p.grad for name, p in trained(policy.network).items()})
        kept.append(sum(numbers))
    assert kept[1] < kept[0]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_samples_may_come_in_several_chunks(tiny_model: Path) -> None:
    chunked = pa.concat_tables([cases.table(TREE[:5]), cases.table(TREE[5:])])
    one, two = make_policy(tiny_model), make_policy(tiny_model)
    assert one.update(chunked, spec()) == two.update(cases.table(TREE), spec())


def test_what_multiplies_in_bfloat16_learns_nearly_the_same(tiny_model: Path) -> None:
    torch.manual_seed(1)
    plain, half = make_policy(tiny_model, 3), make_policy(tiny_model, 3, matmul="bfloat16")
    for name, parameter in trained(plain.network).items():
        parameter.data.normal_(std=0.1)
        trained(half.network)[name].data.copy_(parameter.data)
    base = copies(half.network)
    table = cases.table(TREE)
    for ours, theirs in zip(half.logprobs(table), plain.logprobs(table), strict=True):
        assert 0 < np.abs(ours - theirs).max() < 0.05
    plain.update(table, spec())
    half.update(table, spec(learning_rate=1e-3))
    for name, parameter in trained(half.network).items():
        expected = trained(plain.network)[name].grad
        assert parameter.grad is not None and expected is not None
        assert float((parameter.grad - expected).norm() / expected.norm()) < 0.1, name
    moved = {name for name, tensor in copies(half.network).items() if not tensor.equal(base[name])}
    assert moved == trained(half.network).keys()


def test_weights_that_leave_a_gpu_have_the_checksum_of_where_they_arrive() -> None:
    class OnGpu:  # a mock: there is no GPU here
        is_cuda = True

        def cpu(self) -> torch.Tensor:
            return torch.arange(6.0)

    left = weights.Manifest(1, (("a", (2, 3)),), f"{weights.weighted_sum(torch.arange(6.0)):016x}")
    [(name, arrived)] = weights.unflatten(*weights.in_memory(OnGpu(), left))  # type: ignore[arg-type]
    assert name == "a" and arrived.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    damaged = weights.Manifest(1, left.tensors, f"{weights.weighted_sum(torch.arange(1.0, 7.0)):016x}")
    with pytest.raises(ValueError, match="version 1 left the GPU damaged"):
        weights.in_memory(OnGpu(), damaged)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, 4])
def test_buffers_that_belong_to_a_model_are_saved_with_it(tiny_model: Path, tmp_path: Path, rank: int) -> None:
    """As the correction that some routers have beside their weights."""
    policy = TextPolicy(tiny_model, lora_rank=rank)
    attention = policy.network.get_submodule(("base_model.model." if rank else "") + "model.layers.0.self_attn")
    attention.register_buffer("correction", torch.tensor([3.0]))
    attention.register_buffer("computed", torch.tensor([4.0]), persistent=False)
    policy.save_model(tmp_path, {})
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["model.layers.0.self_attn.correction"] == 3 and not any("computed" in name for name in saved)


def test_a_model_whose_logits_are_not_finite_is_named_as_such(tiny_model: Path, tmp_path: Path) -> None:
    """Its weights are finite, and what comes of them is not."""
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="logits are not finite"):
        TextPolicy(tmp_path / "model")
