"""The ranking policy: Plackett–Luce against its definition, updates against plain autograd, engine against learner."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from srl_rlvr import records
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.engines.ranking_engine import RankingEngine
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.policies.questions import Question, pack, unpack
from srl_rlvr.policies.ranking import ORDER, Kind, RankingPolicy, draw, log_probabilities

KINDS: tuple[Kind, ...] = ("bi", "cross")
TEXTS = [(2, 40 + i, 50 + 2 * i, *range(60, 60 + i), 3) for i in range(6)]
QUESTIONS = [
    Question(TEXTS[0], tuple(TEXTS[1:])),
    Question(TEXTS[1], tuple(TEXTS[2:5])),
    Question(TEXTS[0], tuple(TEXTS[1:]), (2,)),
    Question(TEXTS[2], tuple(TEXTS[3:]), ranks=(4, 1, 9)),
]


def brute_force(logits: list[float], picks: list[int], taken: tuple[int, ...] = ()) -> float:
    left = {c: z for c, z in enumerate(logits) if c not in taken}
    total = 0.0
    for pick in picks:
        total += left[pick] - math.log(sum(math.exp(z) for z in left.values()))
        del left[pick]
    return total


def samples(*rows: tuple[int, list[int], float]) -> pa.Table:
    """Of (question, picks, advantage)."""
    return records.build(
        "Sample",
        [
            {
                "prompt_id": f"q{question}", "sample_index": index, "trunk_id": f"q{question}", "policy_version": 0,
                "prompt_ids": pack(QUESTIONS[question]), "completion_ids": picks,
                "behavior_logprobs": [-1.0] * len(picks), "advantage": advantage,
            }
            for index, (question, picks, advantage) in enumerate(rows)
        ],
    )  # fmt: skip


BATCH = ((0, [3, 0, 4], 1.0), (0, [1, 2, 0], -1.0), (1, [2, 0], 0.5), (2, [4], -0.5), (3, [1, 2], 1.0))


def spec(**changes: Any) -> UpdateSpec:
    return UpdateSpec(**({"loss": "policy_gradient", "learning_rate": 0.0, "importance_cap": 1e9} | changes))


def policy(model: Path, kind: Kind, **changes: Any) -> RankingPolicy:
    return RankingPolicy(model, kind=kind, max_grad_norm=1e9, **changes)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_prompt_holds_its_question(question: Question) -> None:
    assert unpack(pack(question)) == question


def test_a_prompt_that_was_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="should have"):
        unpack(pack(QUESTIONS[1])[:-2])


def test_log_probabilities_are_those_of_plackett_and_luce() -> None:
    logits = [0.3, -1.0, 2.0, 0.0]
    picks = [[2, 0], [1], [3, 2, 1, 0]]
    found = log_probabilities(torch.tensor([logits] * 3), picks)
    sums = [float(part.sum()) for part in found.split([2, 1, 4])]
    assert sums == pytest.approx([brute_force(logits, of) for of in picks], abs=1e-5)
    orders = list(map(list, itertools.permutations(range(4))))
    whole = log_probabilities(torch.tensor([logits] * len(orders)), orders).reshape(-1, 4).sum(1).exp().sum()
    assert float(whole) == pytest.approx(1.0, abs=1e-5)


def test_what_is_drawn_is_as_frequent_as_its_probability() -> None:
    logits = np.array([0.5, -np.inf, 1.5, -0.5])
    orders, logprobs = draw(logits, 20_000, 2, 1.0, np.random.default_rng(0))
    assert 1 not in orders
    for order in ([2, 0], [3, 2]):
        alike = (orders == order).all(1)
        expected = brute_force([0.5, 0.0, 1.5, -0.5], order, taken=(1,))
        assert alike.mean() == pytest.approx(math.exp(expected), abs=0.01)
        assert logprobs[alike][0].sum() == pytest.approx(expected, abs=1e-9)


def test_at_temperature_zero_the_best_come_in_order_and_no_more_than_are_left() -> None:
    orders, _ = draw(np.array([0.5, -np.inf, 1.5, -0.5]), 2, 10, 0.0, np.random.default_rng(0))
    assert orders.tolist() == [[2, 0, 3]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_learner_gives_what_is_drawn_the_log_probability_that_the_engine_recorded(
    tiny_encoder: Path, kind: Kind
) -> None:
    engine, learner = RankingEngine(tiny_encoder, kind, 64), policy(tiny_encoder, kind)
    groups = engine.sample([pack(question) for question in QUESTIONS], SamplingSpec(3, 0.7, 3, seed=5))
    rows = [(q, completion.token_ids, 0.0) for q, group in enumerate(groups) for completion in group]
    found = learner.logprobs(samples(*rows), temperature=0.7)
    recorded = [completion.logprobs for group in groups for completion in group]
    for ours, theirs in zip(found, recorded, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert all(2 not in completion.token_ids for completion in groups[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens_per_pass", [12, 4096])
def test_the_gradient_is_that_of_the_loss_however_many_passes_it_takes(
    tiny_encoder: Path, kind: Kind, tokens_per_pass: int
) -> None:
    learner, plain = policy(tiny_encoder, kind, tokens_per_microbatch=tokens_per_pass), policy(tiny_encoder, kind)
    found = learner.update(samples(*BATCH), spec())
    texts = plain.scorer.texts(QUESTIONS)
    logits = plain.scorer.logits(QUESTIONS, texts, plain.scorer(texts))
    loss = torch.zeros(())
    for question, picks, advantage in BATCH:
        now = log_probabilities(logits[question : question + 1], [picks])
        weight = torch.exp(now.detach() + 1.0)  # the engine is said to have drawn each with log-probability -1
        loss = loss - (weight * advantage * torch.exp(now - now.detach())).sum()
    (loss / sum(len(picks) for _, picks, _ in BATCH)).backward()
    for ours, theirs in zip(learner.parameters, plain.parameters, strict=True):
        expected = torch.zeros_like(ours) if theirs.grad is None else theirs.grad
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, expected, atol=2e-6, rtol=1e-3)
    assert found["grad_norm"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_candidate_counts_by_its_place_in_the_order_of_a_search(tiny_encoder: Path, kind: Kind) -> None:
    scorer, ranked = policy(tiny_encoder, kind).scorer, QUESTIONS[3]
    questions = [QUESTIONS[0], ranked, replace(ranked, ranks=())]
    texts = scorer.texts(questions)
    _, found, without = scorer.logits(questions, texts, scorer.encode(texts))
    assert (without - found)[:3].tolist() == pytest.approx((ORDER * np.log(ranked.ranks)).tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_that_is_drawn_again_with_other_candidates_is_another(tiny_encoder: Path, kind: Kind) -> None:
    twice = [row | {"prompt_id": "the same"} for row in samples((1, [0], 1.0), (0, [4], -1.0)).to_pylist()]
    learner = policy(tiny_encoder, kind)
    together = learner.logprobs(records.build("Sample", twice), 1.0)
    alone = [learner.logprobs(records.build("Sample", [row]), 1.0)[0] for row in twice]
    assert np.concatenate(together) == pytest.approx(np.concatenate(alone))


def test_a_text_that_questions_share_is_encoded_once(tiny_encoder: Path) -> None:
    assert sorted(policy(tiny_encoder, "bi").scorer.texts(QUESTIONS)) == sorted(TEXTS)


def test_cross_entropy_raises_the_probability_of_the_experts_order(tiny_encoder: Path) -> None:
    learner, batch = policy(tiny_encoder, "bi"), samples((0, [3, 0], 1.0), (1, [1], 1.0))
    before = np.concatenate(learner.logprobs(batch)).sum()
    losses = [learner.update(batch, spec(loss="cross_entropy", learning_rate=1e-3))["loss"] for _ in range(5)]
    assert losses[0] == pytest.approx(-before / 3, abs=1e-4)
    assert np.concatenate(learner.logprobs(batch)).sum() > before and losses == sorted(losses, reverse=True)


def test_kl_is_zero_at_the_reference_and_grows_away_from_it(tiny_encoder: Path) -> None:
    learner = policy(tiny_encoder, "bi")
    learner.begin_stage(keep_reference=True)
    changed = spec(kl=0.1, learning_rate=1e-2)
    assert learner.update(samples(*BATCH), changed)["kl"] == pytest.approx(0.0, abs=1e-6)
    assert learner.update(samples(*BATCH), changed)["kl"] > 1e-4


def test_what_is_saved_goes_on_as_if_it_had_not_been_interrupted(tiny_encoder: Path, tmp_path: Path) -> None:
    first, second = policy(tiny_encoder, "cross"), policy(tiny_encoder, "cross")
    changed = spec(learning_rate=1e-2)
    first.update(samples(*BATCH), changed)
    first.save(tmp_path)
    second.load(tmp_path)
    assert second.version == 1
    for learner in (first, second):
        learner.update(samples(*BATCH), changed)
    assert torch.equal(first.flat, second.flat)


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_serves_what_the_learner_hands_over_and_saves(
    tiny_encoder: Path, tmp_path: Path, kind: Kind
) -> None:
    learner, engine = policy(tiny_encoder, kind), RankingEngine(tiny_encoder, kind, 4096)
    learner.update(samples(*BATCH), spec(learning_rate=1e-2))
    flat, manifest = learner.export()
    assert engine.load(flat, manifest) == manifest.checksum and engine.version == 1
    learner.save_model(tmp_path / "model", {"model_type": "x"})
    saved = RankingEngine(tmp_path / "model", kind, 4096)
    prompts, asked = [pack(question) for question in QUESTIONS], SamplingSpec(2, 1.0, 3)
    assert engine.sample(prompts, asked) == saved.sample(prompts, asked)


def test_cut_embeddings_learn_too_where_they_are_asked_for(tiny_encoder: Path) -> None:
    learner, plain = policy(tiny_encoder, "bi", dimensions=(4, 8)), policy(tiny_encoder, "bi")
    learner.update(samples((0, [3, 0], 1.0), (1, [1], 1.0)), spec(loss="cross_entropy"))
    texts = plain.scorer.texts(QUESTIONS[:2])
    vectors = plain.scorer(texts)
    losses = []
    for dimensions in (32, 4, 8):
        cut = torch.nn.functional.normalize(vectors[:, :dimensions], dim=-1)
        logits = plain.scorer.logits(QUESTIONS[:2], texts, cut)
        losses.append(-log_probabilities(logits, [[3, 0], [1]]).sum() / 3)
    torch.stack(losses).mean().backward()
    for ours, theirs in zip(learner.parameters, plain.parameters, strict=True):
        expected = torch.zeros_like(ours) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(ours.grad, expected, atol=2e-6, rtol=1e-3)


def test_pairs_are_refused(tiny_encoder: Path) -> None:
    with pytest.raises(ValueError, match="leave the dpo stage out"):
        policy(tiny_encoder, "bi").update(samples(*BATCH), spec(loss="preference"))
