"""What each stage asks of the policy, what it compares with, and how it moves the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from srl_rlvr import records
from srl_rlvr.config import RlvrStage, SftStage, SrlStage
from srl_rlvr.errors import InputError
from srl_rlvr.model_types import task_llm
from srl_rlvr.policies import base_models
from srl_rlvr.stages import learning_rate, policy_gradient_spec, rlvr, sft, srl

STEPS = {"3 + 4 + 5": (["3 + 4 = 7", "7 + 5 = 12"], "12"), "1 + 1": (["1 + 1 = 2"], "2"), "9": ([], "9")}


def examples(*prompts: str) -> pa.Table:
    rows = [
        records.example(
            model_type="task_llm", task="sums", prompt=prompt, steps=STEPS[prompt][0], reference=STEPS[prompt][1],
            verifier="number", metadata={"unit": "m"}, provenance={"file": "sums.jsonl", "line": 3},
        )
        for prompt in prompts
    ]  # fmt: skip
    return records.build("Example", rows)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return base_models.load_tokenizer(tiny_model)


def srl_stage(**changes: Any) -> SrlStage:
    return SrlStage(kind="srl", **changes)


def rlvr_stage(**changes: Any) -> RlvrStage:
    return RlvrStage(kind="rlvr", **changes)


def by_trunk(prompts: pa.Table) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in prompts.to_pylist():
        found.setdefault(row["trunk_id"], []).append(row)
    return found


@pytest.mark.parametrize("think", [False, True])
def test_the_step_prompts_of_a_problem_are_prefixes_of_one_trunk(tokenizer: Any, think: bool) -> None:
    prompts = srl.prompts(examples("3 + 4 + 5", "1 + 1"), tokenizer, srl_stage(), think)
    trunks = by_trunk(prompts)
    assert [len(rows) for rows in trunks.values()] == [3, 2]  # the answer's line is a step, too
    for rows in trunks.values():
        trunk = rows[-1]["token_ids"]
        assert [row["step_index"] for row in rows] == list(range(len(rows)))
        for row in rows:
            assert row["token_ids"] == trunk[: row["offset"]] and row["offset"] == len(row["token_ids"])
        assert [row["offset"] for row in rows] == sorted({row["offset"] for row in rows})


def test_own_thoughts_stand_before_the_earlier_steps_of_one_trunk(tokenizer: Any) -> None:
    problems = examples("3 + 4 + 5")
    (plain,) = by_trunk(srl.prompts(problems, tokenizer, srl_stage(), True)).values()
    thoughts = {plain[0]["id"]: tokenizer.encode("<think>hm</think>"), plain[2]["id"]: tokenizer.encode("<think>")}
    (rows,) = by_trunk(srl.prompts(problems, tokenizer, srl_stage(own_thoughts=True), True, thoughts)).values()
    prompt = tokenizer.decode(plain[0]["token_ids"])
    assert [tokenizer.decode(row["token_ids"]).removeprefix(prompt) for row in rows] == [
        "", "<think>hm</think>3 + 4 = 7\n", "<think>hm</think>3 + 4 = 7\n7 + 5 = 12\n",
    ]  # fmt: skip
    assert [row["id"] for row in rows] == [row["id"] for row in plain]
    assert all(row["token_ids"] == rows[-1]["token_ids"][: row["offset"]] for row in rows)


def test_the_best_thought_is_the_one_before_the_action_that_earned_most(tokenizer: Any) -> None:
    drawn = [  # prompt, outcome, reward, text
        ("a", "scored", 0.5, "<think>one</think>3 + 4 = 8\n"),
        ("a", "scored", 0.9, "<think>two</think>3 + 4 = 7\n"),
        ("a", "scored", 0.9, "<think>three</think>3 + 4 = 7\n"),
        ("b", "failed", 1.0, "<think>one</think>7"),
        ("b", "scored", 0.0, "<think></think>no"),
        ("c", "invalid", -1.0, "<think>never closed"),
    ]
    rollouts = [
        {"prompt_id": id, "sample_index": n, "policy_version": 0, "token_ids": tokenizer.encode(text), "text": text,
         "logprobs": [0.0] * len(tokenizer.encode(text)), "finish_reason": "stop"}
        for n, (id, _, _, text) in enumerate(drawn)
    ]  # fmt: skip
    verdicts = [
        {"prompt_id": id, "sample_index": n, "outcome": outcome, "reward": reward, "components": "{}", "detail": ""}
        for n, (id, outcome, reward, _) in enumerate(drawn)
    ]
    tables = records.build("Rollout", rollouts), records.build("Verdict", verdicts)
    best = srl.best_thoughts(*tables, tokenizer)
    texts = {id: tokenizer.decode(tokens) for id, tokens in best.items()}
    assert set(texts) == {"a", "b"}
    assert texts["a"].startswith("<think>two</think>") and texts["b"].startswith("<think></think>")
    assert best["a"] == tokenizer.encode("<think>two</think>3 + 4 = 7\n")[: len(best["a"])]
    assert set(srl.best_thoughts(*tables, tokenizer, least=0.8)) == {"a"}


def test_a_solution_with_own_thoughts_is_learned_up_to_the_first_step_without_one(tokenizer: Any) -> None:
    problems = examples("3 + 4 + 5", "1 + 1")
    first, second = (rows[0]["id"] for rows in by_trunk(srl.prompts(problems, tokenizer, srl_stage(), True)).values())
    thoughts = {srl.step_id(first.rpartition(":")[0], k): tokenizer.encode(f"<think>{k}</think>") for k in (0, 2)}
    (sample,) = sft.samples(problems, tokenizer, True, thoughts).to_pylist()
    assert first.startswith(sample["prompt_id"]) and not second.startswith(sample["prompt_id"])
    assert tokenizer.decode(sample["completion_ids"]) == "<think>0</think>3 + 4 = 7\n"
    plain = sft.samples(problems, tokenizer, True).to_pylist()
    assert plain[0]["prompt_ids"] == sample["prompt_ids"] and len(plain) == 2


def test_prompts_have_ids_of_their_own(tokenizer: Any) -> None:
    prompts = srl.prompts(examples("3 + 4 + 5", "1 + 1"), tokenizer, srl_stage(), False)
    assert len(set(prompts["id"].to_pylist())) == prompts.num_rows


def test_all_steps_one_after_the_other_are_the_solution_that_the_warm_up_teaches(tokenizer: Any) -> None:
    problems = examples("3 + 4 + 5", "1 + 1")
    solutions = sft.samples(problems, tokenizer, think=False).to_pylist()
    for sample, rows in zip(
        solutions, by_trunk(srl.prompts(problems, tokenizer, srl_stage(), False)).values(), strict=True
    ):
        whole = sample["prompt_ids"] + sample["completion_ids"]
        assert sample["prompt_ids"] == rows[0]["token_ids"]
        assert [whole[: row["offset"]] for row in rows] == [row["token_ids"] for row in rows]
        text = tokenizer.decode(sample["completion_ids"], skip_special_tokens=True)
        assert text == "".join(row["reference"] for row in rows)
        last = tokenizer.encode(rows[-1]["reference"], add_special_tokens=False)
        assert whole[rows[-1]["offset"] :] == [*last, tokenizer.eos_token_id]


def test_references_carry_their_line_breaks_and_the_last_is_the_answer(tokenizer: Any) -> None:
    prompts = srl.prompts(examples("3 + 4 + 5"), tokenizer, srl_stage(), False)
    assert prompts["reference"].to_pylist() == ["3 + 4 = 7\n", "7 + 5 = 12\n", "Answer: 12"]


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [(2, ["3 + 4 = 7\n7 + 5 = 12\n", "Answer: 12"]), (0, ["3 + 4 = 7\n7 + 5 = 12\nAnswer: 12"])],
)
def test_an_action_of_several_lines(tokenizer: Any, lines: int, wanted: list[str]) -> None:
    stage, problems = srl_stage(lines_per_action=lines), examples("3 + 4 + 5")
    rows = srl.prompts(problems, tokenizer, stage, False).to_pylist()
    assert [row["reference"] for row in rows] == wanted
    assert srl.sampling(stage, think=False, seed=0).stops == ("\n",) * lines
    experts = srl.expert_actions(problems, tokenizer, stage)
    assert [tokenizer.decode(experts[row["id"]], skip_special_tokens=True) for row in rows] == wanted
    solution = sft.samples(problems, tokenizer, think=False).to_pylist()[0]
    whole = solution["prompt_ids"] + solution["completion_ids"]
    assert [row["token_ids"] + experts[row["id"]] for row in rows][-1] == whole


def test_srl_is_rewarded_by_similarity_in_the_stages_units(tokenizer: Any) -> None:
    prompts = srl.prompts(examples("1 + 1"), tokenizer, srl_stage(measure="words", name="early"), True)
    assert set(prompts["verifier"].to_pylist()) == {"similarity"} and set(prompts["stage"].to_pylist()) == {"early"}
    assert json.loads(prompts["metadata"][0].as_py()) == {"think": True, "measure": "words"}


def test_a_problem_without_steps_is_refused_by_name(tokenizer: Any) -> None:
    problems = examples("1 + 1", "9")
    wanted = f"problem {problems['id'][1].as_py()} of 'sums' has no expert steps .*sums.jsonl.*: give its row"
    for build in (
        lambda: srl.prompts(problems, tokenizer, srl_stage(), False),
        lambda: sft.samples(problems, tokenizer, False),
    ):
        with pytest.raises(InputError, match=wanted) as caught:
            build()
        assert "\n" not in str(caught.value)


def test_rlvr_asks_the_whole_problem_and_names_its_own_verifier(tokenizer: Any) -> None:
    problems = examples("3 + 4 + 5", "9")
    rows = rlvr.prompts(problems, tokenizer, "rlvr", False, invalid_reward=-0.5).to_pylist()
    for row, example in zip(rows, problems.to_pylist(), strict=True):
        assert row["token_ids"] == task_llm.TYPE.encode_prompt(tokenizer, example, False)
        assert row["id"] == row["trunk_id"] == example["id"] and row["offset"] == len(row["token_ids"])
        assert (row["step_index"], row["verifier"], row["reference"]) == (-1, "number", example["reference"])
        assert json.loads(row["metadata"]) == {"unit": "m", "invalid_reward": -0.5}


def test_srl_and_rlvr_ask_the_same_question(tokenizer: Any) -> None:
    problems = examples("3 + 4 + 5")
    first_step = srl.prompts(problems, tokenizer, srl_stage(), False)["token_ids"][0]
    assert first_step == rlvr.prompts(problems, tokenizer, "rlvr", False)["token_ids"][0]


def test_the_question_stands_in_the_users_turn_and_the_answer_is_open(tokenizer: Any) -> None:
    text = tokenizer.decode(task_llm.TYPE.encode_prompt(tokenizer, {"prompt": "1 + 1"}, think=False))
    assert "<|user|>1 + 1<|end|>" in text and text.endswith("<|assistant|>") and "<think>" not in text


def test_under_think_the_monologue_comes_before_each_action(tokenizer: Any) -> None:
    assert "<think> and </think>" in tokenizer.decode(
        task_llm.TYPE.encode_prompt(tokenizer, {"prompt": "1 + 1"}, think=True)
    )
    assert srl.sampling(srl_stage(), think=True, seed=0).stops == ("</think>", "\n")
    assert srl.sampling(srl_stage(lines_per_action=2), think=True, seed=0).stops == ("</think>", "\n") * 2
    taught = sft.samples(examples("1 + 1"), tokenizer, think=True)["completion_ids"][0].as_py()
    text = tokenizer.decode(taught, skip_special_tokens=True)
    assert text == "<think></think>1 + 1 = 2\n<think></think>Answer: 2"


def test_expert_steps_are_prompted_without_monologues_even_under_think(tokenizer: Any) -> None:
    last = srl.prompts(examples("3 + 4 + 5"), tokenizer, srl_stage(), True)["token_ids"][-1].as_py()
    assert tokenizer.decode(last).endswith("<|assistant|>3 + 4 = 7\n7 + 5 = 12\n")


def test_an_action_ends_with_its_line_and_a_whole_answer_with_its_text() -> None:
    assert srl.sampling(srl_stage(), think=False, seed=5).stops == ("\n",)
    spec = rlvr.sampling(rlvr_stage(group_size=6, temperature=0.7, max_tokens=99), seed=5)
    assert (spec.samples, spec.temperature, spec.max_tokens, spec.stops, spec.seed) == (6, 0.7, 99, (), 5)


def test_the_learning_rate_rises_over_the_warm_up_and_stays() -> None:
    stage = srl_stage(learning_rate=3e-5, warmup_steps=2)
    assert [learning_rate(stage, step) for step in range(5)] == pytest.approx([1e-5, 2e-5, 3e-5, 3e-5, 3e-5])
    assert learning_rate(srl_stage(learning_rate=3e-5, warmup_steps=0), 0) == 3e-5


def test_an_update_is_told_all_that_the_stage_says() -> None:
    stage = rlvr_stage(
        temperature=0.7, clip_low=0.1, clip_high=0.3, importance_cap=4.0, kl=0.05, updates_per_batch=2, warmup_steps=0
    )
    spec = policy_gradient_spec(stage, 0)
    assert (spec.loss, spec.learning_rate, spec.temperature) == ("policy_gradient", 1e-5, 0.7)
    assert (spec.clip_low, spec.clip_high, spec.importance_cap, spec.kl, spec.updates) == (0.1, 0.3, 4.0, 0.05, 2)


@pytest.mark.parametrize(("advantage", "length"), [("grpo", 0), ("rloo", 0), ("dr_grpo", 77)])
def test_only_dr_grpo_divides_by_a_constant_length(advantage: Any, length: int) -> None:
    assert policy_gradient_spec(rlvr_stage(advantage=advantage, max_tokens=77), 0).constant_length == length


def test_the_warm_up_counts_its_updates_over_all_epochs() -> None:
    stage = SftStage(kind="sft", epochs=3, batch_size=4)
    assert sft.steps(stage, 10) == 8
    assert sft.steps(SftStage(kind="sft", examples=6, batch_size=4), 10) == 2
    assert sft.update_spec(stage, 9).loss == "cross_entropy"
