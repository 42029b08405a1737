"""A run from examples to report: base evaluation, then each stage and its evaluation, then the model.

It reads as the algorithm. The actors come in as one object, the Crew; this file never imports Ray.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from srl_rlvr import checkpoints, model_types, records
from srl_rlvr import config as configs
from srl_rlvr.batch import Batch
from srl_rlvr.checkpoints import History, State
from srl_rlvr.config import DpoStage, PolicyGradientStage, RlvrStage, RunConfig, SftStage, SrlStage, Stage
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import InputError, RunError, Stopped
from srl_rlvr.examples.curriculum import Informative, Selector, Uniform, levels
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.records import PASSED
from srl_rlvr.reporting import alarms
from srl_rlvr.reporting.result import Interval, mean_interval
from srl_rlvr.reporting.rollout_log import RolloutLog
from srl_rlvr.scheduling import admits
from srl_rlvr.seeds import derived_seed
from srl_rlvr.stages import dpo, policy_gradient_spec, rlvr, sft, srl

log = logging.getLogger(__name__)

_RECENT_STEPS = 8  # that say how many groups carry signal


class Crew(Protocol):
    def sample(self, prompts: pa.Table, spec: SamplingSpec) -> tuple[pa.Table, pa.Table, dict[str, float]]: ...
    def send(self, prompts: pa.Table, spec: SamplingSpec) -> Any: ...
    def receive(self, ticket: Any) -> tuple[pa.Table, pa.Table, dict[str, float]]: ...
    def update(self, samples: pa.Table, spec: UpdateSpec) -> dict[str, float]: ...
    def begin_stage(self, keep_reference: bool) -> None: ...
    def hand_over(self) -> None: ...
    def save(self, folder: Path) -> None: ...
    def commit(self, folder: Path) -> None: ...
    def load(self, folder: Path, version: int | None = None) -> None: ...
    def save_model(self, folder: Path, card: dict[str, Any]) -> None: ...


class Observer(Protocol):
    """Who is told what happens: progress display, tracker, metrics endpoint."""

    def stage(self, label: str, kind: str, steps: int) -> None: ...
    def phase(self, text: str) -> None: ...
    def step(self, metrics: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


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
    dev: pa.Table | None = None  # Example; each stage keeps the weights that solve most of them
    should_stop: Callable[[], bool] = lambda: False
    started: float = field(default_factory=time.monotonic)  # of the clock of metrics and results
    watch: alarms.Watch = field(init=False)
    rollouts: RolloutLog = field(init=False)
    warned: set[str] = field(init=False, default_factory=set)  # evaluations whose answers are cut off; said once

    def __post_init__(self) -> None:
        self.rollouts = RolloutLog(self.out / "rollouts")
        self.watch = alarms.Watch(self.history.metrics)
        self.model_type = model_types.find(self.config.model_type)

    def execute(self) -> None:
        """All stages that are not done yet. Raises Stopped after saving where `should_stop` says so."""
        self.started -= self.state.seconds
        self.rollouts.cut(self.state.rollouts)
        if "base" not in self.state.held_out:
            self._evaluate("base")
        while self.state.stage < len(self.config.stages):
            stage = self.config.stages[self.state.stage]
            if self.state.step == 0:
                self.crew.begin_stage(
                    isinstance(stage, DpoStage) or (isinstance(stage, PolicyGradientStage) and stage.kl > 0)
                )
                if self.state.best_step < 0:
                    self._look_at_dev(stage)
            if isinstance(stage, SftStage):
                self._warm_up(stage)
            elif isinstance(stage, DpoStage):
                self._prefer(stage)
            else:
                self._reinforce(stage)
            self._take_best(stage)
            is_last = self.state.stage == len(self.config.stages) - 1
            if is_last or self.config.evaluation.on_stages:
                self._evaluate(stage.label)
            self.state.stage += 1
            self.state.step = 0
            self.state.selector, self.state.hardest, self.state.thoughts = {}, {}, None
            if self.dev is not None:
                self.state.best_step = 0  # the next stage begins with what this one ends with
            self._checkpoint()
            if self.should_stop() and not is_last:
                raise Stopped(f"stopped after {stage.label}; everything up to here is saved")

    def _warm_up(self, stage: SftStage) -> None:
        """Cross-entropy on worked solutions, in a new order each epoch."""
        examples = self._examples(stage)
        thoughts = self._thoughts(sft.drawing(stage), examples, PASSED) if stage.own_thoughts else None
        samples = sft.samples(examples, self.tokenizer, self.config.think, thoughts)
        if not samples.num_rows:
            raise RunError(
                f"{stage.label}: in {stage.samples} samples of each the policy found the first step of no problem, so "
                "there are no thoughts to learn from: draw more samples, or train an srl stage first"
            )
        steps = sft.steps(stage, examples.num_rows)
        trunk_ids = samples["trunk_id"].to_pylist()
        selector = Uniform(trunk_ids, self.config.seed, stage.label, self.state.selector, repeats=True)
        self.observer.stage(stage.label, stage.kind, steps)
        for step in self._steps_left(stage, steps):
            began = time.monotonic()
            rows = selector.take(stage.batch_size)
            metrics = self.crew.update(
                self.model_type.together(samples.take(pa.array(rows)), "prompt_ids"), sft.update_spec(stage, step)
            )
            self.state.version += 1
            metrics = {name: metrics[name] for name in ("loss", "grad_norm")}
            metrics["learning_rate"] = sft.update_spec(stage, step).learning_rate
            metrics["update_s"] = time.monotonic() - began
            metrics |= self._look_at_dev(stage, step + 1, steps)
            self._finish_step(stage.label, metrics, step == steps - 1)
        self.crew.hand_over()

    def _prefer(self, stage: DpoStage) -> None:
        """Pairs of the expert's solution and a wrong answer of the policy's own."""
        examples = self._examples(stage)
        prompts = rlvr.prompts(examples, self.tokenizer, stage.label, self.config.think)
        solutions = sft.samples(examples, self.tokenizer, self.config.think)
        experts = {row["prompt_id"]: row for row in solutions.to_pylist()}
        selector = Uniform(prompts["trunk_id"].to_pylist(), self.config.seed, stage.label, self.state.selector)
        self.observer.stage(stage.label, stage.kind, stage.steps)
        for step in self._steps_left(stage, stage.steps):
            rows = selector.take(stage.prompts_per_step)
            seed = derived_seed(self.config.seed, stage.label, step)
            rollouts, verdicts, metrics = self.crew.sample(prompts.take(pa.array(rows)), dpo.sampling(stage, seed))
            rewards, outcomes = verdicts["reward"].to_pylist(), verdicts["outcome"].to_pylist()
            judged = [r for r, o in zip(rewards, outcomes, strict=True) if o != records.FAILED]
            wrong = [o != records.FAILED and r < PASSED for r, o in zip(rewards, outcomes, strict=True)]
            tokens = pc.sum(pc.list_value_length(rollouts["token_ids"])).as_py()  # type: ignore[attr-defined]
            self.state.sampled_tokens += tokens
            metrics |= {
                "pass_rate": sum(r >= PASSED for r in judged) / max(len(judged), 1),
                **{outcome: float(outcomes.count(outcome)) for outcome in records.OUTCOMES},
                "completion_tokens": tokens / len(rows),
                "truncated": _cut_off(rollouts),
            }
            samples = dpo.pairs(experts, rollouts, wrong)
            if samples.num_rows:
                began = time.monotonic()
                spec = dpo.update_spec(stage, step)
                found = self.crew.update(samples, spec)
                metrics |= {name: found[name] for name in ("loss", "preferred", "grad_norm")}
                metrics |= {"learning_rate": spec.learning_rate, "update_s": time.monotonic() - began}
                self.state.version += 1
                self.crew.hand_over()
            else:
                why = "every problem is solved" if judged else "no answer could be verified"
                self.observer.note(f"{stage.label}, step {step + 1}: {why}; no update")
            metrics |= self._look_at_dev(stage, step + 1, stage.steps)
            self._finish_step(stage.label, metrics, step == stage.steps - 1)

    def _reinforce(self, stage: SrlStage | RlvrStage) -> None:
        """SRL and RLVR: sample groups, keep those with signal, update, hand the weights over."""
        examples = self._examples(stage)
        if isinstance(stage, SrlStage):
            thoughts = self._thoughts(stage, examples) if stage.own_thoughts else None
            prompts = srl.prompts(examples, self.tokenizer, stage, self.config.think, thoughts)
        else:
            prompts = rlvr.prompts(examples, self.tokenizer, stage.label, self.config.think, stage.invalid_reward)
        experts = {}
        if isinstance(stage, SrlStage) and stage.expert_in_group:
            experts = srl.expert_actions(examples, self.tokenizer, stage)
        stream = Stream(stage, prompts, self._selector(stage, prompts), experts)
        self.observer.stage(stage.label, stage.kind, stage.steps)
        for step in self._steps_left(stage, stage.steps):
            self._send_ahead(stream, step)
            batch = self._collect(stream, step)
            metrics, samples = batch.metrics, batch.samples
            if samples.num_rows:
                began = time.monotonic()
                spec = policy_gradient_spec(stage, step)
                metrics |= self.crew.update(samples, spec) | {"learning_rate": spec.learning_rate}
                metrics["update_s"] = time.monotonic() - began
                self.state.version += 1
                self.crew.hand_over()
                metrics["handover_s"] = time.monotonic() - began - metrics["update_s"]
            else:
                self.observer.note(f"{stage.label}, step {step + 1}: every group earned one reward alike; no update")
            del self.state.pending[0]
            metrics |= self._look_at_dev(stage, step + 1, stage.steps)
            self._finish_step(stage.label, metrics, step == stage.steps - 1)
        for _, _, ticket in stream.sent:  # of a stage that ended early
            self.crew.receive(ticket)
        self.state.pending.clear()

    def _send_ahead(self, stream: Stream, step: int) -> None:
        """Send the batch of this step and those that `max_staleness` admits after it, if they are not on their way.

        What was drawn before an interruption stands in `state.pending` and comes before new prompts.
        """
        stage, pending = stream.stage, self.state.pending
        while (batch := step + len(stream.sent)) < stage.steps and admits(batch, step, self.config.max_staleness):
            if len(stream.sent) == len(pending):
                pending.append(stream.selector.take(self._prompts_ahead(stage)))
            stream.sent.append(self._send(stream, batch, 0, pending[len(stream.sent)]))

    def _prompts_ahead(self, stage: PolicyGradientStage) -> int:
        """How many prompts are drawn for one batch, so that `prompts_per_step` groups of it should carry signal.

        In turn it can be refilled. While the next batch is on its way a refill would have the learner wait behind it,
        so what lately carried no signal is drawn in addition at once.
        """
        if self.config.max_staleness == 0:
            return stage.prompts_per_step
        recent = [row for row in self.history.metrics[-_RECENT_STEPS:] if row["stage"] == stage.label]
        drawn, with_signal = (sum(row[name] for row in recent) for name in ("groups_drawn", "groups_with_signal"))
        wanted = math.ceil(stage.prompts_per_step * max(drawn, 1) / max(with_signal, 1))
        return min(wanted, stage.prompts_per_step * (1 + stage.max_refills))

    def _collect(self, stream: Stream, step: int) -> Batch:
        """Draw prompts until `prompts_per_step` groups carry signal, or the refills are used up (DAPO, section 3.2)."""
        stage = stream.stage
        batch = Batch(stage, self.state.version, self.config.max_staleness, stream.experts)
        rows, prompts, ticket = stream.sent.popleft()
        refills = 0 if self.config.max_staleness else stage.max_refills
        for attempt in range(1 + refills):
            if attempt:
                rows = stream.selector.take(stage.prompts_per_step - batch.with_signal)
                _, prompts, ticket = self._send(stream, step, attempt, rows)
            rollouts, verdicts, seconds = self.crew.receive(ticket)
            self.state.sampled_tokens += batch.add(prompts, rollouts, verdicts, seconds)
            groups = zip(rows, batch.rewards[-len(rows) :], strict=True)
            stream.selector.learn([(row, rewards.tolist()) for row, rewards in groups])
            self._keep_rollouts(stage.label, step, attempt, prompts, rollouts, verdicts, batch)
            if batch.with_signal >= stage.prompts_per_step:
                break
        return batch

    def _examples(self, stage: Stage) -> pa.Table:
        """What the stage learns from; under `hardest` with the candidates that the policy ranks highest at first."""
        examples = self.train.slice(0, stage.examples)
        if not stage.hardest:
            return examples
        if not self.state.hardest:
            self.observer.phase(f"ranking the candidates of {examples.num_rows} questions")
            prompts = rlvr.prompts(examples, self.tokenizer, stage.label, self.config.think)
            picks = stage.hardest + max(map(len, examples["steps"].to_pylist()))
            rollouts, _, _ = self.crew.sample(prompts, SamplingSpec(1, 0.0, picks))
            orderings = zip(rollouts["prompt_id"].to_pylist(), rollouts["token_ids"].to_pylist(), strict=True)
            self.state.hardest = dict(orderings)
        return self.model_type.narrowed(examples, self.state.hardest, stage.hardest)

    def _thoughts(self, stage: SrlStage, examples: pa.Table, least: float = -math.inf) -> dict[str, list[int]]:
        """What the policy thought at first before its best action of each step, where that earned `least`."""
        if self.state.thoughts is None:
            self.observer.phase(f"drawing thoughts about the steps of {examples.num_rows} problems")
            prompts = srl.prompts(examples, self.tokenizer, stage, self.config.think)
            seed = derived_seed(self.config.seed, stage.label, "thoughts")
            rollouts, verdicts, _ = self.crew.sample(prompts, srl.sampling(stage, self.config.think, seed))
            self.state.sampled_tokens += pc.sum(pc.list_value_length(rollouts["token_ids"])).as_py()  # type: ignore[attr-defined]
            self._warn_if_cut_off(f"{stage.label}, thoughts", _cut_off(rollouts), f"stages.{stage.label}.max_tokens")
            self.state.thoughts = srl.best_thoughts(rollouts, verdicts, self.tokenizer, least)
        return self.state.thoughts

    def _selector(self, stage: PolicyGradientStage, prompts: pa.Table) -> Selector:
        trunk_ids = prompts["trunk_id"].to_pylist()
        if stage.curriculum == "uniform":
            return Uniform(trunk_ids, self.config.seed, stage.label, self.state.selector)
        # Numbered, as levels are named for files, and those may be elsewhere when the run is resumed.
        found = levels(self.train)
        number_of = {level: str(number) for number, level in enumerate(dict.fromkeys(found))}
        arm_of = dict(zip(self.train["id"].to_pylist(), (number_of[level] for level in found), strict=True))
        arms = [arm_of[example_id] for example_id in prompts["example_id"].to_pylist()]
        return Informative(trunk_ids, arms, self.config.seed, stage.label, self.state.selector)

    def _send(self, stream: Stream, step: int, attempt: int, rows: list[int]) -> tuple[list[int], pa.Table, Any]:
        """The rows, their prompts and the ticket."""
        prompts = self.model_type.together(stream.prompts.take(pa.array(rows)), "token_ids")
        seed = derived_seed(self.config.seed, stream.stage.label, step, attempt)
        if isinstance(stream.stage, SrlStage):
            spec = srl.sampling(stream.stage, self.config.think, seed)
        else:
            spec = rlvr.sampling(stream.stage, seed)
        return rows, prompts, self.crew.send(prompts, spec)

    def _look_at_dev(self, stage: Stage, done: int = 0, steps: int = 0) -> dict[str, float]:
        """Every `evaluation.every` updates, before the first of the run and after the last: the pass rate on the dev
        problems.

        The weights with the best are kept, of equals the newest.
        """
        if self.dev is None or (done % self.config.evaluation.every and done != steps):
            return {}
        if done and isinstance(stage, SftStage):
            self.crew.hand_over()
        self.observer.phase(f"looking at {self.dev.num_rows} dev problems")
        scores = self._scores(f"{stage.label}, dev", self.dev)
        score = sum(scores) / len(scores)
        if done:
            self.state.dev_scores.append([len(self.history.metrics) + 1, score])
        if score >= self.state.best_score:
            self.state.best_step, self.state.best_score = done, score
            self.state.best = checkpoints.write_best(self.out, self.state.version, self.crew.save)
        return {"dev": score}

    def _steps_left(self, stage: Stage, steps: int) -> Iterator[int]:
        """Of a stage of `steps`, until `evaluation.patience` looks in a row found it below its best."""
        looks = self.config.evaluation.patience
        for step in range(self.state.step, steps):
            since_best = step - self.state.best_step
            if self.dev is not None and looks and since_best >= looks * self.config.evaluation.every:
                self.observer.note(
                    f"{stage.label}: ends after step {step}, {since_best} after its best on the dev problems"
                )
                return
            yield step

    def _take_best(self, stage: Stage) -> None:
        """The stage ends with the weights that were best on the dev problems."""
        if self.dev is None or self.state.best_step == self.state.step:
            return
        self.state.version += 1
        self.crew.load(self.out / self.state.best, self.state.version)
        self.crew.hand_over()
        best = f"step {self.state.best_step}" if self.state.best_step else "its beginning"
        self.observer.note(f"{stage.label}: ends with the weights of {best}: {self.state.best_score:.1%} of dev solved")

    def _evaluate(self, label: str) -> None:
        """Greedy pass rate on the held-out problems."""
        self.observer.phase(f"evaluating {label} on {self.held_out.num_rows} held-out problems")
        scores = self._scores(label, self.held_out)
        score, low, high = mean_interval(scores)
        self.state.held_out[label], self.state.counted = [score, low, high], len(scores)
        found = f"{self.model_type.metric} {score:.1%} ({low:.1%} to {high:.1%})"
        self.observer.note(f"{label}: {found} on {len(scores)} held-out problems")

    def _scores(self, label: str, examples: pa.Table) -> list[float]:
        """Of the greedy answers that count. A verification that failed is left out, and said."""
        config = self.config
        scores, predictions = evaluate(examples, self.tokenizer, self.crew, config.think, config.evaluation.max_tokens)
        check_counted(label, predictions)
        failed = len(predictions) - len(judged(predictions))
        if failed:
            self.observer.note(f"{label}: {failed} verifications failed and do not count")
        cut_off = sum(found["cut_off"] for found in predictions) / len(predictions)
        self._warn_if_cut_off(label, cut_off, "evaluation.max_tokens")
        return scores

    def _warn_if_cut_off(self, label: str, share: float, key: str) -> None:
        if share >= alarms.CUT_OFF and label not in self.warned:
            self.warned.add(label)
            self.observer.note(f"WARNING: {label}: {share:.0%} of answers are cut off before they end; raise {key}")

    def _finish_step(self, label: str, metrics: dict[str, Any], is_last: bool) -> None:
        self.state.seconds = time.monotonic() - self.started
        row = {"stage": label, "step": self.state.step, "update": self.state.version, "seconds": self.state.seconds}
        self.history.metrics.append(row | metrics)
        self.observer.step(row | metrics)
        for alarm in self.watch.look(row | metrics):
            self.observer.note(f"WARNING: {alarm}")
        self.state.step += 1
        if self.should_stop():
            self._checkpoint()
            raise Stopped(f"stopped after step {self.state.step} of {label}; everything up to here is saved")
        if self.state.step % self.config.checkpoint_every == 0 and not is_last:
            self._checkpoint()

    def _checkpoint(self) -> None:
        self.observer.phase("writing a checkpoint")
        self.state.seconds = time.monotonic() - self.started
        folder = checkpoints.write(self.out, self.state, self.history, configs.dump(self.config), self._save)
        self.crew.commit(folder)

    def _save(self, folder: Path) -> None:
        self.crew.save(folder)
        self.state.rollouts = self.rollouts.flush()

    def without_update(self) -> list[str]:
        """A line for each stage that made no update."""
        return alarms.without_update(self.history.metrics)

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
        size = batch.stage.group_size
        answers = rollouts.slice(0, keep * size).to_pylist(), verdicts.slice(0, keep * size).to_pylist()
        rows = []
        for g, prompt in enumerate(prompts.slice(0, keep).to_pylist()):
            text = self.model_type.show(self.tokenizer, prompt["token_ids"])
            of_group = slice(g * size, (g + 1) * size)
            for rollout, verdict in zip(answers[0][of_group], answers[1][of_group], strict=True):
                kept = {name: rollout[name] for name in ("prompt_id", "sample_index", "logprobs", "finish_reason")}
                kept |= {name: verdict[name] for name in ("reward", "outcome", "components", "detail")}
                kept |= {"stage": label, "step": step, "prompt": text, "reference": prompt["reference"]}
                kept["tokens"] = [self.tokenizer.decode([token]) for token in rollout["token_ids"]]
                kept["advantage"] = batch.advantage_of.get((prompt["id"], rollout["sample_index"]), 0.0)
                rows.append(kept)
        self.rollouts.append(rows)


@dataclass
class Stream:
    """The prompts of one stage on their way: in which order they are drawn, and the batches that were sent."""

    stage: SrlStage | RlvrStage
    prompts: pa.Table
    selector: Selector
    experts: Mapping[str, list[int]]  # by prompt id: tokens of the action that joins its group
    sent: deque[tuple[list[int], pa.Table, Any]] = field(
        default_factory=deque
    )  # rows, prompts, ticket; first: this step


class Sampler(Protocol):
    def sample(self, prompts: pa.Table, spec: SamplingSpec) -> tuple[pa.Table, pa.Table, dict[str, float]]: ...


def evaluate(
    examples: pa.Table, tokenizer: Any, sampler: Sampler, think: bool, max_tokens: int
) -> tuple[list[float], list[dict[str, Any]]]:
    """(scores of what was judged and counts, predictions): one greedy answer to each example, scored by its own
    verifier."""
    model_type = model_types.of(examples)
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
                "cut_off": rollout["finish_reason"] == "length",
                "outcome": verdict["outcome"],
                "logprobs": rollout["logprobs"],
                "counts": model_type.counts(example),
                "score": model_type.score(verdict["reward"]) if judged else 0.0,
                "components": verdict["components"],
                "detail": verdict["detail"],
            }
        )
    return counted(predictions), predictions


def _cut_off(rollouts: pa.Table) -> float:
    """The share of answers that end at max_tokens."""
    return pc.mean(pc.equal(rollouts["finish_reason"], "length")).as_py()  # type: ignore[attr-defined]


def judged(predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose verification did not fail."""
    return [found for found in predictions if found["outcome"] != records.FAILED]


def counted(predictions: list[dict[str, Any]]) -> list[float]:
    """The scores that an evaluation's mean is over."""
    return [found["score"] for found in judged(predictions) if found["counts"]]


def check_counted(label: str, predictions: list[dict[str, Any]]) -> None:
    """Raises RunError where an evaluation's mean would be over nothing."""
    if not judged(predictions):
        first = predictions[0]["detail"]
        raise RunError(f"{label}: all {len(predictions)} verifications failed, the first with: {first}")
    if not counted(predictions):
        raise RunError(f"{label}: none of the {len(predictions)} problems counts: all are out of scope")


def fitting(
    train: pa.Table, evaluated: Iterable[pa.Table], tokenizer: Any, config: RunConfig, model_limit: int
) -> list[pa.Table]:
    """`train` and those `evaluated`, of which every problem leaves room to answer, for SRL at its last step, and for
    the solution that SFT or DPO learns. Thoughts come on top, as their length is not known before they are drawn.
    Problems that leave room for less than `max_tokens` stay, and are counted in a warning.

    Raises InputError naming the first problem that does not; where every source skips what is bad, those are left out,
    counted and said.
    """
    limit, model_type = config.model.max_context, model_types.find(config.model_type)
    if limit > model_limit:
        raise InputError(f"model.max_context is {limit}, but the model was made for at most {model_limit} tokens")
    taken = [(stage.kind, stage.examples or train.num_rows) for stage in config.stages]
    longest = {stage.kind: getattr(stage, "max_tokens", 0) for stage in config.stages}
    for_action, for_answer = longest.get("srl", 0), max(longest.get("rlvr", 0), longest.get("dpo", 0))
    by_step = max((count for kind, count in taken if kind == "srl"), default=0)
    as_a_whole = max((count for kind, count in taken if kind in ("sft", "dpo")), default=0)
    skip_bad = all(source.skip_bad for source in config.data)
    tables, too_long, short_of_room = list[pa.Table](), list[str](), 0
    for table, learned in ((train, True), *((each, False) for each in evaluated)):
        fit: list[int] = []
        for row, example in enumerate(table.to_pylist()):
            solution = model_type.encode_solution(tokenizer, example, config.think)
            steps, room, what = 0, 1, "is"
            if learned and len(fit) < as_a_whole:
                steps, room, what = len(solution.steps), 0, "and its solution are"
            elif learned and len(fit) < by_step:
                steps, what = len(solution.steps) - 1, "and the steps before its last are"
            tokens = len(solution.trunk(steps))
            if tokens + room <= limit:
                asked = config.evaluation.max_tokens if not learned else for_answer
                short = len(solution.trunk(0)) + asked > limit
                if learned and len(fit) < by_step:
                    short |= len(solution.trunk(len(solution.steps) - 1)) + for_action > limit
                short_of_room += short
                fit.append(row)
                continue
            found = (
                f"problem {example['id']} ({example['provenance']}) {what} {tokens} tokens long and "
                f"model.max_context is {limit}"
            )
            if not skip_bad:
                raise InputError(f"{found}: raise it, or leave out what does not fit by --skip-bad")
            too_long.append(found)
        if table.num_rows and not fit:
            raise InputError(f"{too_long[-1]}, and none of the {table.num_rows} fits: raise it")
        tables.append(table if len(fit) == table.num_rows else table.take(pa.array(fit, pa.int64())))
    if too_long:
        log.warning("problems too long, and left out: %d; the first: %s", len(too_long), too_long[0])
    if short_of_room:
        log.warning(
            "problems that leave less than max_tokens of model.max_context = %d for an answer, which is cut off there: "
            "%d of %d", limit, short_of_room, sum(table.num_rows for table in tables),
        )  # fmt: skip
    return tables


def held_out_intervals(state: State) -> dict[str, Interval]:
    return {label: Interval(*values) for label, values in state.held_out.items()}
