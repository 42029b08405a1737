from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srl_rlvr import records
from srl_rlvr.engines import Completion, SamplingSpec, create, in_segments, rollout_table
from srl_rlvr.engines.branch_cache import Prefill
from srl_rlvr.engines.transformers_engine import TransformersEngine, _draw
from srl_rlvr.errors import InputError
from srl_rlvr.policies import base_models
from srl_rlvr.policies.text import TextPolicy

# Of uneven lengths, so that padding is at work; character tokens of the tiny model are 5 and up.
PROMPTS = [[10, 11, 12, 13, 14, 15, 16], [20, 21], [30, 31, 32, 33], [40]]


# The steps of two problems: each step prompt is a prefix of the next one's.
STEP_PROMPTS = [[10, 11, 12], [10, 11, 12, 13, 14, 15], [10, 11, 12, 13, 14, 15, 16], [20, 21], [20, 21, 30, 31, 32]]


def make(
    model: Path, max_running: int = 64, max_context: int = 512, kv_cache_gib: float = 1.0, **options: Any
) -> TransformersEngine:
    room = {"max_running": max_running, "max_context": max_context, "kv_cache_gib": kv_cache_gib}
    return TransformersEngine(model, **room, **options)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return make(tiny_model)


def biased(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, likely: dict[str, float]) -> None:
    """Make some characters likely: random weights alone hardly ever sample what a test waits for."""
    bias = torch.zeros(engine.network.config.vocab_size)
    for text, value in likely.items():
        bias[engine.tokenizer.convert_tokens_to_ids(text)] = value
    head = engine.network.get_output_embeddings()
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: forward(hidden) + bias)


def samples(prompts: list[list[int]], groups: list[list[Completion]]) -> Any:
    rows = [
        {
            "prompt_id": str(p), "sample_index": i, "trunk_id": str(p), "policy_version": 0, "prompt_ids": prompt,
            "completion_ids": c.token_ids, "behavior_logprobs": c.logprobs, "advantage": 0.0,
        }
        for p, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        for i, c in enumerate(group)
    ]  # fmt: skip
    return records.build("Sample", rows)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_logprobs_it_reports_are_those_of_the_learner(
    tiny_model: Path, engine: TransformersEngine, temperature: float
) -> None:
    groups = engine.sample(PROMPTS, SamplingSpec(3, temperature, 24, seed=1))
    found = TextPolicy(tiny_model).logprobs(samples(PROMPTS, groups), temperature)
    reported = [completion.logprobs for group in groups for completion in group]
    for learner, sampler in zip(found, reported, strict=True):
        np.testing.assert_allclose(sampler, learner, atol=1e-4)


@pytest.mark.parametrize("max_running", [64, 3, 1])
@pytest.mark.parametrize("prompts", [PROMPTS, STEP_PROMPTS, [*STEP_PROMPTS, *PROMPTS[1:], PROMPTS[2]]])
def test_greedy_is_what_transformers_generates(tiny_model: Path, prompts: list[list[int]], max_running: int) -> None:
    engine, network = make(tiny_model, max_running), base_models.load_model(tiny_model)
    groups = engine.sample(prompts, SamplingSpec(1, 0.0, 16))
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt])
        whole = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        assert completion.token_ids == whole[0, len(prompt) :].tolist()


def test_prompts_that_are_prefixes_of_one_another_are_computed_once(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    forward = engine._forward

    def count(ids: list[int], positions: Any, sampling: Any, *others: Any) -> torch.Tensor:
        if isinstance(sampling, Prefill):
            computed.append(len(ids))
        return forward(ids, positions, sampling, *others)

    monkeypatch.setattr(engine, "_forward", count)
    engine.sample(STEP_PROMPTS, SamplingSpec(3, 1.0, 4))
    assert computed == [7 + 5]


@pytest.mark.parametrize(("max_running", "kv_cache_gib"), [(64, 1.0), (7, 1.0), (2, 1.0), (64, 1e-4)])
def test_a_sample_does_not_depend_on_what_runs_beside_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, max_running: int, kv_cache_gib: float
) -> None:
    prompts = [*STEP_PROMPTS, *PROMPTS]
    spec = SamplingSpec(5, 1.0, 24, seed=3)
    whole = make(tiny_model)
    biased(whole, monkeypatch, {"<|end|>": 2.0})  # rows end at different times, and others take their places
    expected = whole.sample(prompts, spec)
    engine = make(tiny_model, max_running, kv_cache_gib=kv_cache_gib)
    biased(engine, monkeypatch, {"<|end|>": 2.0})
    found = engine.sample(prompts, spec)
    assert len({len(c.token_ids) for group in expected for c in group}) > 5
    assert [[c.token_ids for c in group] for group in found] == [[c.token_ids for c in group] for group in expected]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.randn(1, 6).expand(200_000, 6) * 2
    for temperature in (1.0, 0.5):
        tokens, logprobs = _draw(logits, temperature, torch.rand(len(logits), dtype=torch.float64))
        expected = torch.softmax(logits[0] / temperature, dim=-1)
        found = torch.bincount(tokens, minlength=6) / len(tokens)
        torch.testing.assert_close(found, expected, atol=0.005, rtol=0.0)
        torch.testing.assert_close(logprobs, torch.log(expected)[tokens])


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(engine: TransformersEngine) -> None:
    first, again, other = (engine.sample(PROMPTS, SamplingSpec(4, 1.0, 12, seed=s)) for s in (5, 5, 6))
    assert first == again and first != other


def test_samples_of_a_group_differ(engine: TransformersEngine) -> None:
    (group,) = engine.sample(PROMPTS[:1], SamplingSpec(6, 1.0, 12))
    assert len({tuple(completion.token_ids) for completion in group}) == 6


def test_the_longest_completion_ends_by_length(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    biased(engine, monkeypatch, {"<|end|>": -100.0})
    for group in engine.sample(PROMPTS, SamplingSpec(2, 1.0, 9)):
        assert [(len(c.token_ids), len(c.logprobs), c.finish_reason) for c in group] == [(9, 9, "length")] * 2


def test_the_end_of_text_token_is_the_last_and_stands_in_the_completion(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    biased(engine, monkeypatch, {"<|end|>": 3.0})
    completions = [c for group in engine.sample(PROMPTS, SamplingSpec(8, 1.0, 60)) for c in group]
    ended = [c for c in completions if c.finish_reason == "stop"]
    assert len(ended) > 10
    for completion in completions:
        ends = [i for i, token in enumerate(completion.token_ids) if token == engine.tokenizer.eos_token_id]
        assert ends == ([len(completion.token_ids) - 1] if completion.finish_reason == "stop" else [])


def test_a_line_break_ends_an_action_and_stands_in_it(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    biased(engine, monkeypatch, {"\n": 3.0, "<|end|>": -100.0})
    completions = [c for group in engine.sample(PROMPTS, SamplingSpec(8, 1.0, 60, stops=("\n",))) for c in group]
    for completion in completions:
        text = engine.tokenizer.decode(completion.token_ids)
        assert completion.finish_reason == ("stop" if text.endswith("\n") else "length")
        assert "\n" not in text[:-1]
    assert sum(c.finish_reason == "stop" for c in completions) > 20


def scripted(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, text: str) -> SamplingSpec:
    """Whatever the model says, the next token is that of `text`; each sample writes it from its beginning."""
    script = engine.tokenizer.encode(text, add_special_tokens=False)
    prompt_length = len(PROMPTS[0])

    def forward(ids: list[int], positions: list[int], sampling: Any, keep: Any, images: Any = ()) -> torch.Tensor:
        rows = keep.tolist() if isinstance(sampling, Prefill) else range(len(ids))
        logits = torch.full((len(rows), engine.network.config.vocab_size), -50.0)
        for i, row in enumerate(rows):
            logits[i, script[(positions[row] + 1 - prompt_length) % len(script)]] = 50.0
        return logits

    monkeypatch.setattr(engine, "_forward", forward)
    return SamplingSpec(2, 1.0, 40, stops=("</think>", "\n"))


@pytest.mark.parametrize(
    ("written", "max_tokens", "expected", "reason"),
    [
        ("<think>a\nb</think>3 + 4\nmore", 40, "<think>a\nb</think>3 + 4\n", "stop"),
        ("no thoughts\n and none to come", 20, "no thoughts\n and non", "length"),
        ("<think>a</think>endless endless", 20, "<think>a</think>endl", "length"),
        ("<think>ab</think>rest", 17, "<think>ab</think>", "length"),
        ("<think>a<|end|>more", 40, "<think>a<|end|>", "stop"),
        ("<think></think>x<|end|>more", 40, "<think></think>x<|end|>", "stop"),
    ],
)
def test_stops_are_read_one_after_the_other(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, written: str, max_tokens: int, expected: str, reason: str
) -> None:
    engine = make(tiny_model)
    spec = scripted(engine, monkeypatch, written)
    (group,) = engine.sample(PROMPTS[:1], SamplingSpec(2, 1.0, max_tokens, stops=spec.stops))
    for completion in group:
        assert engine.tokenizer.decode(completion.token_ids) == expected
        assert completion.finish_reason == reason and len(completion.logprobs) == len(completion.token_ids)


def test_a_stop_is_found_where_it_ends_in_the_middle_of_nothing_else(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    biased(engine, monkeypatch, {"a": 6.0, "b": 6.0, "<|end|>": -100.0})
    completions = [c for group in engine.sample(PROMPTS, SamplingSpec(8, 1.0, 40, stops=("abba",))) for c in group]
    texts = [engine.tokenizer.decode(c.token_ids) for c in completions]
    assert any(c.finish_reason == "stop" for c in completions)
    for text, completion in zip(texts, completions, strict=True):
        assert text.find("abba") == (len(text) - 4 if completion.finish_reason == "stop" else -1)


def test_prompt_and_completion_keep_within_the_context(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(tiny_model, max_context=12)
    biased(engine, monkeypatch, {"<|end|>": -100.0})
    groups = engine.sample(PROMPTS, SamplingSpec(1, 1.0, 50))
    assert [len(prompt) + len(group[0].token_ids) for prompt, group in zip(PROMPTS, groups, strict=True)] == [12] * 4
    assert {group[0].finish_reason for group in groups} == {"length"}


def test_a_monologue_that_fills_the_context_is_not_gone_on_with(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(tiny_model, max_context=len(PROMPTS[0]) + 17)
    spec = scripted(engine, monkeypatch, "<think>ab</think>rest")
    (group,) = engine.sample(PROMPTS[:1], spec)
    assert [(len(c.token_ids), c.finish_reason) for c in group] == [(17, "length")] * 2


def test_batches_larger_than_what_runs_at_once_are_cut(tiny_model: Path) -> None:
    spec = SamplingSpec(3, 0.0, 10)
    whole, cut = make(tiny_model).sample(PROMPTS, spec), make(tiny_model, max_running=4).sample(PROMPTS, spec)
    assert [[c.token_ids for c in group] for group in whole] == [[c.token_ids for c in group] for group in cut]
    larger_than_all = make(tiny_model, max_running=2).sample(PROMPTS, spec)
    assert [len(group) for group in larger_than_all] == [3] * 4


@pytest.mark.parametrize(
    ("lora_rank", "matmul", "off"),
    [(0, "float32", 1e-4), (4, "float32", 1e-4), (4, "bfloat16", 0.02)],
    ids=["full", "lora", "bfloat16"],
)
def test_loaded_weights_are_served_and_their_checksum_returned(
    tiny_model: Path, lora_rank: int, matmul: Any, off: float
) -> None:
    engine = make(tiny_model, matmul=matmul)
    policy = TextPolicy(tiny_model, lora_rank=lora_rank, matmul=matmul)
    before = engine.sample(PROMPTS, SamplingSpec(2, 1.0, 12))
    for version in (1, 2):  # adapters are added to the base, not to what was loaded before
        with torch.no_grad():
            for parameter in policy.network.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        policy.version = version
        buffer, manifest = policy.export()
        assert engine.load(buffer, manifest) == manifest.checksum
        assert engine.version == version
        after = engine.sample(PROMPTS, SamplingSpec(2, 1.0, 12))
        assert after != before
        found = policy.logprobs(samples(PROMPTS, after))
        for learner, completion in zip(found, (c for group in after for c in group), strict=True):
            np.testing.assert_allclose(completion.logprobs, learner, atol=off)
        before = after


def test_adapters_after_full_weights_stand_beside_the_base(tiny_model: Path) -> None:
    engine, full, lora = make(tiny_model), TextPolicy(tiny_model), TextPolicy(tiny_model, lora_rank=4)
    with torch.no_grad():
        for policy in (full, lora):
            for parameter in policy.network.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    for policy in (lora, full, lora):
        engine.load(*policy.export())
        groups = engine.sample(PROMPTS, SamplingSpec(2, 1.0, 12))
        found = policy.logprobs(samples(PROMPTS, groups))
        for learner, completion in zip(found, (c for group in groups for c in group), strict=True):
            np.testing.assert_allclose(completion.logprobs, learner, atol=1e-4)


def test_damaged_weights_are_refused_and_the_old_ones_stay(tiny_model: Path) -> None:
    engine = make(tiny_model)
    buffer, manifest = TextPolicy(tiny_model).export()
    before = engine.sample(PROMPTS, SamplingSpec(1, 0.0, 8))
    buffer[7] += 1.0
    with pytest.raises(ValueError, match="arrived damaged"):
        engine.load(buffer, manifest)
    assert engine.sample(PROMPTS, SamplingSpec(1, 0.0, 8)) == before and engine.version == 0


def test_rollouts_stand_in_the_order_of_their_prompts(engine: TransformersEngine) -> None:
    prompts = records.SCHEMAS["Prompt"].empty_table().select(["id"]).schema
    ids = ["p0", "p1", "p2", "p3"]
    table = rollout_table(
        prompts.empty_table().from_pydict({"id": ids}), engine.sample(PROMPTS, SamplingSpec(2, 1.0, 5)), 4,
        engine.tokenizer,
    )  # fmt: skip
    assert table["prompt_id"].to_pylist() == [each for each in ids for _ in range(2)]
    assert table["sample_index"].to_pylist() == [0, 1] * 4 and set(table["policy_version"].to_pylist()) == {4}


def test_attention_that_a_trunk_would_change_is_refused_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    soft_capped = Gemma2Config(**shape, layer_types=["full_attention"], attn_logit_softcapping=50.0)
    models = {
        "sliding": MistralForCausalLM(MistralConfig(**shape, sliding_window=8)),
        "softcap": Gemma2ForCausalLM(soft_capped),
    }
    for word, model in models.items():
        folder = shutil.copytree(tiny_model, tmp_path / word)
        model.save_pretrained(folder)
        with pytest.raises(InputError, match=f"transformers engine .*{word}.* set engine.kind") as caught:
            make(folder)
        assert "\n" not in str(caught.value)


def test_an_engine_is_made_by_its_name(tiny_model: Path) -> None:
    made = create(
        "transformers", tiny_model, {"max_running": 4, "max_context": 64, "kv_cache_gib": 1, "block_size": 32}
    )
    assert isinstance(made, TransformersEngine)


def test_only_those_that_met_the_first_stop_go_on_to_the_second() -> None:
    asked: list[tuple[list[list[int]], list[int], list[int], str]] = []

    def one_segment(prompts: list[list[int]], samples: list[int], max_tokens: list[int], stop: str) -> Any:
        asked.append((prompts, samples, max_tokens, stop))
        if stop == "A":
            met = [Completion([1, 2], [-0.1, -0.2], "stop"), Completion([3], [-0.3], "length")]
            return [([met[0], met[1]], [True, False])]
        return [([Completion([9], [-0.9], "stop")], [True])]

    (group,) = in_segments(one_segment, [[7]], SamplingSpec(2, 1.0, 10, stops=("A", "B")), 64)
    assert asked == [([[7]], [2], [10], "A"), ([[7, 1, 2]], [1], [8], "B")]
    assert [(c.token_ids, c.logprobs, c.finish_reason) for c in group] == [
        ([1, 2, 9], [-0.1, -0.2, -0.9], "stop"),
        ([3], [-0.3], "length"),
    ]


def test_a_prompt_that_fills_the_context_is_refused_in_one_line(tiny_model: Path) -> None:
    engine = make(tiny_model, max_context=7)
    with pytest.raises(InputError, match="a prompt of 7 tokens leaves no room to answer in a context of 7") as caught:
        engine.sample(PROMPTS, SamplingSpec(1, 1.0, 5))
    assert "\n" not in str(caught.value)


def test_keys_and_values_keep_within_their_budget(tiny_model: Path) -> None:
    prompts = [[10 + n % 40, *range(5, 90), *range(5, 90)] for n in range(40)]
    for samples_ in (1, 4, 8):
        engine = make(tiny_model, kv_cache_gib=0.002)
        engine.sample(prompts, SamplingSpec(samples_, 1.0, 16))
        assert engine._cache is not None
        tensors = [tensor for pair in engine._cache.own + engine._cache.trunk for tensor in pair]
        held = sum(tensor.nbytes for tensor in tensors) / 2**30
        assert 0.0005 < held < 0.0022


def test_logits_of_prompts_that_are_done_are_let_go(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    groups_of = engine._groups
    monkeypatch.setattr(engine, "_groups", lambda *given: kept.extend(found := groups_of(*given)) or found)
    engine.sample(PROMPTS, SamplingSpec(2, 1.0, 4))
    assert len(kept) == len(PROMPTS) and not any(group.trunk.logits for group in kept)


def test_every_end_that_the_model_names_ends_a_sample(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    plain = make(tmp_path / "model")
    other = plain.tokenizer.convert_tokens_to_ids("z")
    config = {"eos_token_id": [plain.tokenizer.eos_token_id, other]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(config))
    engine = make(tmp_path / "model")
    biased(engine, monkeypatch, {"z": 99.0})
    [[completion]] = engine.sample([[10, 11]], SamplingSpec(1, 1.0, 8))
    assert completion.token_ids == [other] and completion.finish_reason == "stop"
