"""A run from examples to report: base evaluation, then each stage and its evaluation, then the model.

It reads as the algorithm. The actors come in as one object, the Crew; this file never imports Ray.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from srl_rlvr import checkpoints, records
from srl_rlvr import config as configs
from srl_rlvr.checkpoints import History, State
from srl_rlvr.config import PolicyGradientStage, RunConfig, SftStage, SrlStage
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import InputError, RunError
from srl_rlvr.model_types import task_llm
from srl_rlvr.policies.advantages import group_advantages
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.reporting.result import Interval, interval
from srl_rlvr.stages import policy_gradient_spec, rlvr, sft, srl

PASSED = 1.0 - 1e-6


class Crew(Protocol):
    def sample(self, prompts: pa.Table, spec: SamplingSpec) -> tuple[pa.Table, pa.Table, dict[str, float]]: ...
    def update(self, samples: pa.Table, spec: UpdateSpec) -> dict[str, float]: ...
    def begin_stage(self, keep_reference: bool) -> None: ...
    def hand_over(self) -> None: ...
    def save(self, folder: Path) -> None: ...
    def commit(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


class Observer(Protocol):
    """Who is told what happens: progress display, tracker, metrics endpoint."""

    def stage(self, label: str, kind: str, steps: int) -> None: ...
    def phase(self, text: str) -> None: ...
    def step(self, metrics: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


class Stopped(RunError):
    """Ctrl-C: the step was finished and saved."""

    exit_code = 130


@dataclass
class Run:
    config: RunConfig
    train: pa.Table  # Example
    held_out: pa.Table  # Example
    tokenizer: Any
    crew: Crew
    out: Path
    observer: Observer
    state: State
    history: History
    should_stop: Callable[[], bool] = lambda: False
    started: float = field(default_factory=time.monotonic)  # of the clock of metrics and results

    def execute(self) -> None:
        """All stages that are not done yet. Raises Stopped after saving where `should_stop` says so."""
        self.started -= self.state.seconds
        if "base" not in self.state.held_out:
            self._evaluate("base")
        while self.state.stage < len(self.config.stages):
            stage = self.config.stages[self.state.stage]
            if self.state.step == 0:
                self.crew.begin_stage(keep_reference=isinstance(stage, PolicyGradientStage) and stage.kl > 0)
            if isinstance(stage, SftStage):
                self._warm_up(stage)
            else:
                self._reinforce(stage)
            is_last = self.state.stage == len(self.config.stages) - 1
            if is_last or self.config.evaluation.on_stages:
                self._evaluate(stage.label)
            self.state.stage += 1
            self.state.step = self.state.cursor = 0
            self._checkpoint()
            if self.should_stop() and not is_last:
                raise Stopped(f"stopped after {stage.label}; everything up to here is saved")

    def _warm_up(self, stage: SftStage) -> None:
        """Cross-entropy on worked solutions, in a new order each epoch."""
        examples = self.train.slice(0, stage.examples) if stage.examples else self.train
        samples = sft.samples(examples, self.tokenizer, self.config.think)
        steps = sft.steps(stage, examples.num_rows)
        order = Order(samples["trunk_id"].to_pylist(), self.config.seed, stage.label)
        self.observer.stage(stage.label, stage.kind, steps)
        for step in range(self.state.step, steps):
            began = time.monotonic()
            rows = order.take(self.state.cursor, stage.batch_size)
            self.state.cursor += len(rows)
            metrics = self.crew.update(samples.take(pa.array(rows)), sft.update_spec(stage, step))
            self.state.version += 1
            metrics = {name: metrics[name] for name in ("loss", "grad_norm")}
            metrics["learning_rate"] = sft.update_spec(stage, step).learning_rate
            self._finish_step(stage.label, metrics | {"update_s": time.monotonic() - began}, step == steps - 1)
        self.crew.hand_over()

    def _reinforce(self, stage: configs.SrlStage | configs.RlvrStage) -> None:
        """SRL and RLVR: sample groups, keep those with signal, update, hand the weights over."""
        if isinstance(stage, SrlStage):
            prompts = srl.prompts(self.train, self.tokenizer, stage, self.config.think)
        else:
            prompts = rlvr.prompts(self.train, self.tokenizer, stage.label, self.config.think, stage.invalid_reward)
        order = Order(prompts["trunk_id"].to_pylist(), self.config.seed, stage.label)
        self.observer.stage(stage.label, stage.kind, stage.steps)
        for step in range(self.state.step, stage.steps):
            batch = self._collect(stage, step, prompts, order)
            metrics = batch.metrics
            if batch.samples.num_rows:
                began = time.monotonic()
                spec = policy_gradient_spec(stage, step)
                metrics |= self.crew.update(batch.samples, spec) | {"learning_rate": spec.learning_rate}
                metrics["update_s"] = time.monotonic() - began
                self.state.version += 1
                self.crew.hand_over()
                metrics["handover_s"] = time.monotonic() - began - metrics["update_s"]
            else:
                self.observer.note(f"{stage.label}, step {step + 1}: every group earned one reward alike; no update")
            self._finish_step(stage.label, metrics, step == stage.steps - 1)

    def _collect(
        self, stage: configs.SrlStage | configs.RlvrStage, step: int, prompts: pa.Table, order: Order
    ) -> Batch:
        """Draw prompts until `prompts_per_step` groups carry signal, or the refills are used up (DAPO, section 3.2)."""
        batch = Batch(stage, self.state.version)
        for attempt in range(1 + stage.max_refills):
            rows = order.take(self.state.cursor, stage.prompts_per_step - batch.with_signal)
            self.state.cursor += len(rows)
            drawn = prompts.take(pa.array(rows))
            seed = derived_seed(self.config.seed, stage.label, step, attempt)
            if isinstance(stage, SrlStage):
                spec = srl.sampling(stage, self.config.think, seed)
            else:
                spec = rlvr.sampling(stage, seed)
            rollouts, verdicts, seconds = self.crew.sample(drawn, spec)
            self.state.sampled_tokens += batch.add(drawn, rollouts, verdicts, seconds)
            self._keep_rollouts(stage.label, step, attempt, drawn, rollouts, verdicts, batch)
            if batch.with_signal >= stage.prompts_per_step:
                break
        return batch

    def _evaluate(self, label: str) -> None:
        """Greedy pass rate on the held-out problems. A verification that failed is left out, and said."""
        self.observer.phase(f"evaluating {label} on {self.held_out.num_rows} held-out problems")
        config = self.config
        right, judged, _ = evaluate(
            self.held_out, self.tokenizer, self.crew, config.think, config.evaluation.max_tokens
        )
        if not judged:
            raise RunError(f"{label}: all {self.held_out.num_rows} verifications failed; see verifier.deadline_s")
        self.state.held_out[label] = list(interval(right, judged))
        if judged < self.held_out.num_rows:
            self.observer.note(f"{label}: {self.held_out.num_rows - judged} verifications failed and do not count")
        score, low, high = self.state.held_out[label]
        self.observer.note(f"{label}: {score:.1%} of {judged} held-out problems solved ({low:.1%} to {high:.1%})")

    def _finish_step(self, label: str, metrics: dict[str, Any], is_last: bool) -> None:
        self.state.seconds = time.monotonic() - self.started
        row = {"stage": label, "step": self.state.step, "update": self.state.version, "seconds": self.state.seconds}
        self.history.metrics.append(row | metrics)
        self.observer.step(row | metrics)
        self.state.step += 1
        if self.should_stop():
            self._checkpoint()
            raise Stopped(f"stopped after step {self.state.step} of {label}; everything up to here is saved")
        if self.state.step % self.config.checkpoint_every == 0 and not is_last:
            self._checkpoint()

    def _checkpoint(self) -> None:
        self.observer.phase("writing a checkpoint")
        self.state.seconds = time.monotonic() - self.started
        folder = checkpoints.write(self.out, self.state, self.history, configs.dump(self.config), self.crew.save)
        self.crew.commit(folder)

    def _keep_rollouts(
        self,
        label: str,
        step: int,
        attempt: int,
        prompts: pa.Table,
        rollouts: pa.Table,
        verdicts: pa.Table,
        batch: Batch,
    ) -> None:
        """The first groups of the step, for the report's viewer."""
        keep = min(self.config.tracking.rollouts_per_step, prompts.num_rows) if attempt == 0 else 0
        groups = prompts.slice(0, keep).to_pylist()
        size = batch.stage.group_size
        for g, prompt in enumerate(groups):
            text = self.tokenizer.decode(prompt["token_ids"])
            for i in range(g * size, (g + 1) * size):
                rollout, verdict = rollouts.slice(i, 1).to_pylist()[0], verdicts.slice(i, 1).to_pylist()[0]
                kept = {name: rollout[name] for name in ("prompt_id", "sample_index", "logprobs", "finish_reason")}
                kept |= {name: verdict[name] for name in ("reward", "outcome", "components", "detail")}
                kept |= {"stage": label, "step": step, "prompt": text, "reference": prompt["reference"]}
                kept["tokens"] = [self.tokenizer.decode([token]) for token in rollout["token_ids"]]
                kept["advantage"] = batch.advantage_of.get((prompt["id"], rollout["sample_index"]), 0.0)
                self.history.rollouts.append(kept)


class Batch:
    """Groups drawn for one update: those with signal become samples, all of them are counted."""

    def __init__(self, stage: PolicyGradientStage, version: int):
        self.stage = stage
        self.version = version
        self.with_signal = 0
        self.advantage_of: dict[tuple[str, int], float] = {}
        self._rows: list[dict[str, Any]] = []
        self._rewards: list[float] = []
        self._stds: list[float] = []
        self._outcomes = dict.fromkeys(records.OUTCOMES, 0)
        self._tokens: list[int] = []
        self._drawn = 0
        self._seconds = {"sample_s": 0.0, "verify_s": 0.0}

    def add(self, prompts: pa.Table, rollouts: pa.Table, verdicts: pa.Table, seconds: dict[str, float]) -> int:
        """Count every group and keep the samples of those with signal; returns the tokens that were sampled.

        A failed verdict is no reward: its sample is left out of the group's mean and of the batch. Raises RunError
        where rollouts, verdicts and prompts do not belong together, or a rollout is of another policy version.
        """
        size = self.stage.group_size
        rows, scores = rollouts.to_pylist(), verdicts.to_pylist()
        if not len(rows) == len(scores) == size * prompts.num_rows:
            raise RunError(f"{prompts.num_rows} prompts × {size}: got {len(rows)} rollouts and {len(scores)} verdicts")
        for g, prompt in enumerate(prompts.to_pylist()):
            group = list(zip(rows[g * size : (g + 1) * size], scores[g * size : (g + 1) * size], strict=True))
            self._add_group(prompt, group)
        self._drawn += prompts.num_rows
        for name, value in seconds.items():
            self._seconds[name] += value
        return sum(len(row["token_ids"]) for row in rows)

    def _add_group(self, prompt: dict[str, Any], group: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        for index, (rollout, verdict) in enumerate(group):
            for record in (rollout, verdict):
                found, wanted = (record["prompt_id"], record["sample_index"]), (prompt["id"], index)
                if found != wanted:
                    what = "rollout" if record is rollout else "verdict"
                    raise RunError(f"{what} {found[1]} of {found[0]} stands where {index} of {wanted[0]} should")
            if rollout["policy_version"] != self.version:
                raise RunError(
                    f"a rollout is of policy version {rollout['policy_version']}, the learner's is {self.version}, and "
                    "max_staleness is 0"
                )
            self._outcomes[verdict["outcome"]] += 1
            self._tokens.append(len(rollout["token_ids"]))
        judged = [(rollout, verdict) for rollout, verdict in group if verdict["outcome"] != records.FAILED]
        rewards = np.array([verdict["reward"] for _, verdict in judged], dtype=np.float64)
        self._rewards += rewards.tolist()
        deviation = float(rewards.std()) if len(rewards) else 0.0
        self._stds.append(deviation)
        if len(rewards) < 2 or deviation <= self.stage.min_reward_std:
            return
        self.with_signal += 1
        for (rollout, _), advantage in zip(judged, group_advantages(rewards, self.stage.advantage), strict=True):
            self.advantage_of[(prompt["id"], rollout["sample_index"])] = float(advantage)
            self._rows.append(
                {
                    "prompt_id": prompt["id"],
                    "sample_index": rollout["sample_index"],
                    "trunk_id": prompt["trunk_id"],
                    "policy_version": rollout["policy_version"],
                    "prompt_ids": prompt["token_ids"],
                    "completion_ids": rollout["token_ids"],
                    "behavior_logprobs": rollout["logprobs"],
                    "advantage": float(advantage),
                }
            )

    @property
    def samples(self) -> pa.Table:
        return records.build("Sample", self._rows)

    @property
    def metrics(self) -> dict[str, Any]:
        rewards = np.array(self._rewards) if self._rewards else np.zeros(1)
        return {
            "reward": float(rewards.mean()),
            "reward_std": float(np.mean(self._stds)),
            "pass_rate": float((rewards >= PASSED).mean()),
            "groups_drawn": float(self._drawn),
            "groups_with_signal": float(self.with_signal),
            "completion_tokens": float(np.mean(self._tokens)),
            "tokens_per_s": sum(self._tokens) / max(self._seconds["sample_s"], 1e-9),
            "staleness": 0.0,  # an older rollout is refused
            **{outcome: float(count) for outcome, count in self._outcomes.items()},
            **self._seconds,
        }


class Order:
    """An endless, seeded stream of row numbers: each epoch visits every trunk once, its rows together and in order.

    A position in the stream is one number, so a resumed run goes on exactly where it stopped.
    """

    def __init__(self, trunk_ids: list[str], seed: int, label: str):
        rows_of: dict[str, list[int]] = {}
        for row, trunk_id in enumerate(trunk_ids):
            rows_of.setdefault(trunk_id, []).append(row)
        self._trunks = list(rows_of.values())
        self._rows = len(trunk_ids)
        self._seed, self._label = seed, label
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, cursor: int, count: int) -> list[int]:
        """The next `count` rows, at most an epoch's worth; a row that would come twice ends the batch early."""
        taken: list[int] = []
        seen: set[int] = set()
        while len(taken) < count:
            row = self._at(cursor + len(taken))
            if row in seen:
                break
            seen.add(row)
            taken.append(row)
        return taken

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, self._rows)
        if epoch != self._epoch:
            rng = np.random.default_rng(derived_seed(self._seed, self._label, epoch))
            self._order = np.concatenate([self._trunks[i] for i in rng.permutation(len(self._trunks))])
            self._epoch = epoch
        return int(self._order[index])


class Sampler(Protocol):
    def sample(self, prompts: pa.Table, spec: SamplingSpec) -> tuple[pa.Table, pa.Table, dict[str, float]]: ...


def evaluate(
    examples: pa.Table, tokenizer: Any, sampler: Sampler, think: bool, max_tokens: int
) -> tuple[int, int, list[dict[str, Any]]]:
    """(solved, judged, predictions): one greedy answer to each example, scored by its own verifier."""
    prompts = rlvr.prompts(examples, tokenizer, "evaluation", think)
    rollouts, verdicts, _ = sampler.sample(prompts, SamplingSpec(1, 0.0, max_tokens))
    predictions = []
    for example, rollout, verdict in zip(examples.to_pylist(), rollouts.to_pylist(), verdicts.to_pylist(), strict=True):
        if not example["id"] == rollout["prompt_id"] == verdict["prompt_id"]:
            raise RunError(f"rollout of {rollout['prompt_id']} stands where problem {example['id']} should")
        judged = verdict["outcome"] != records.FAILED
        predictions.append(
            {
                "id": example["id"],
                "text": rollout["text"],
                "reference": example["reference"],
                "outcome": verdict["outcome"],
                "correct": judged and verdict["reward"] >= PASSED,
                "detail": verdict["detail"],
            }
        )
    judged = [prediction for prediction in predictions if prediction["outcome"] != records.FAILED]
    return sum(prediction["correct"] for prediction in judged), len(judged), predictions


def check_fits_context(
    examples: pa.Table, tokenizer: Any, config: RunConfig, model_limit: int, by_steps: bool = False
) -> None:
    """Raises InputError naming the first problem whose prompt (its last step's, `by_steps`) leaves no room."""
    limit = config.model.max_context
    if limit > model_limit:
        raise InputError(f"model.max_context is {limit}, but the model was made for at most {model_limit} tokens")
    for example in examples.to_pylist():
        solution = task_llm.encode_solution(tokenizer, example, config.think)
        tokens = len(solution.trunk(len(solution.steps) - 1) if by_steps else solution.prompt)
        if tokens >= limit:
            what = "and the steps before its last are" if by_steps else "is"
            raise InputError(
                f"problem {example['id']} ({example['provenance']}) {what} {tokens} tokens long and model.max_context "
                f"is {limit}: raise it, or leave the problem out"
            )


def held_out_intervals(state: State) -> dict[str, Interval]:
    return {label: Interval(*values) for label, values in state.held_out.items()}


def derived_seed(*parts: Any) -> int:
    """A 63-bit seed from what it is for, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
