"""A run on 1 to 1,000 generators: the real controller in virtual time.

    python benchmarks/simulate.py            1, 4, 16, 64, 256 and 1,000 generators
    python benchmarks/simulate.py --quick    1, 256 and 1,000, fewer batches

Real: the pipeline's own loop (order, admission, batches, group advantages, sample tables), the cutting into tasks, the
Scheduler, Arrow tables of real size. Replaced by timings (the constants below): engines, learner, hand-over. Measured
here, before the simulation: the verifier pool's rate on the similarity reward, and what one task and one hand-over
cost the driver with the real Dispatcher, real Ray and actors that answer at once.

The controller is one serial resource. Each event costs it the time that the real code takes when it is run then and
there, and for tasks and hand-overs also the driver's CPU time in Ray (all of its threads, as if they took turns). The
batch grows with the generators, eight prompts for each, and so do learner workers: an update takes the same time. With
the measured timings the learner limits already one generator; `max_staleness` 1 is therefore also run with an update
that takes half of its time, where the generators limit.
The limit is what is busy all the time. `stragglers`: nothing is; generators wait for the slowest task of a batch,
because `max_staleness` lets them go no further ahead.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from _machine import tell

from srl_rlvr import config as configs
from srl_rlvr import pipeline, records
from srl_rlvr.checkpoints import History, State
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.scheduling import Scheduler, Task, Ticket, free_ticket

# Of the quickstart's eight RLVR steps on two CPU cores (metrics.parquet): mean of sample_s for 8 of the prompts drawn,
# and its spread; means of update_s and handover_s. A task is 8 prompts × 8 samples.
TASK_PROMPTS, GROUP, PROMPT_TOKENS, COMPLETION_TOKENS = 8, 8, 100, 64
TASK_S, TASK_SPREAD = 14.4, 0.06  # mean; standard deviation of its logarithm
UPDATE_S, HAND_OVER_S = 17.1, 0.05
SETTINGS = {"": (1, UPDATE_S), "_staleness_2": (2, UPDATE_S), "_half_update": (1, UPDATE_S / 2)}
GENERATORS_OF_A_VERIFIER = 16
BUSY = 0.95  # of the time: then it is what limits the rate
EXPERT = "12 + 7 = 19, carry the 1, then 19 + 30 = 49, which leaves 49 - 4 = 45 to be added"


@dataclass(frozen=True)
class Costs:
    """Measured on this machine: CPU seconds of the driver, and of one verifier actor a task."""

    task_s: float
    hand_over_s: float  # to one generator
    verify_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    costs = Costs(*_ray_costs(100 if quick else 500), _verifier_cost(5 if quick else 20))
    print(
        f"the driver's CPU time in Ray: {costs.task_s * 1e3:.2f} ms a task, {costs.hand_over_s * 1e3:.2f} ms a "
        f"hand-over; a verifier: {costs.verify_s * 1e3:.0f} ms a task of {TASK_PROMPTS} × {GROUP}\n"
    )
    print(
        "max_staleness  update s  generators  rollouts/s  efficiency  µs/rollout  queue MiB  "
        "busy: generators  controller  verifiers  learner  limit"
    )
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for name, n in itertools.product(SETTINGS, (1, 256, 1000) if quick else (1, 4, 16, 64, 256, 1000)):
        max_staleness, update_s = SETTINGS[name]
        row = simulate(n, max_staleness, update_s, costs, batches=max(8, 60 // n) if quick else max(30, 1000 // n))
        found[name, n] = row
        row["efficiency"] = row["rate"] / (n * found[name, 1]["rate"])
        busy = row["busy"]
        print(
            f"{max_staleness:>13}  {update_s:>8.1f}  {n:>10}  {row['rate']:>10.1f}  {row['efficiency']:>10.3f}  "
            f"{row['us']:>10.1f}  {row['mib']:>9.1f}  {busy['generators']:>16.1%}  {busy['controller']:>10.1%}  "
            f"{busy['verifiers']:>9.1%}  {busy['learner']:>7.1%}  {row['limit']}"
        )
    largest = found["", 1000]
    efficiencies = {f"efficiency_{n}{name}": found[name, n]["efficiency"] for name in SETTINGS for n in (256, 1000)}
    figures = {name: round(efficiency, 3) for name, efficiency in efficiencies.items()} | {
        "controller_us_per_rollout": round(largest["us"], 1),
        "controller_full_at_generators": round(1e6 / largest["us"] / found["", 1]["rate"]),
        "queue_mib_1000": round(largest["mib"], 1),
        "limit_1000": largest["limit"],
    }
    tell("simulate", figures, whole=not quick)


def simulate(generators: int, max_staleness: int, update_s: float, costs: Costs, batches: int) -> dict[str, Any]:
    """Rates and shares between filling the pipeline and draining it."""
    stage = configs.RlvrStage(
        kind="rlvr", steps=batches, prompts_per_step=TASK_PROMPTS * generators, group_size=GROUP,
        max_tokens=COMPLETION_TOKENS,
    )  # fmt: skip
    config = configs.parse(
        {
            "data": [{"family": "sums"}],
            "stages": [stage.model_dump()],
            "max_staleness": max_staleness,
            "checkpoint_every": batches + 1,
            "tracking": {"rollouts_per_step": 0},
        },
        "simulation",
    )
    gc.collect()
    crew = VirtualCrew(generators, update_s, costs)
    examples, held_out = _examples(2 * stage.prompts_per_step), _examples(1)
    # The loop of one stage asks no more of a crew than this one has.
    run = pipeline.Run(config, examples, held_out, _Tokenizer(), crew, Path(), crew, State(), History())  # type: ignore[arg-type]
    crew.leave()
    run._reinforce(stage)
    return crew.summary(crew.marks[1 + max_staleness : -1 - max_staleness])


class VirtualCrew:
    """What the pipeline drives, on a clock of its own; also the pipeline's observer.

    Between two of its methods the pipeline itself has run: that time is the controller's.
    """

    def __init__(self, generators: int, update_s: float, costs: Costs):
        self.update_s = update_s
        self.costs = costs
        self.scheduler = Scheduler(generators)
        self.now = self.left = 0.0
        self.free_at = {
            "generators": [0.0] * generators,
            "verifiers": [0.0] * math.ceil(generators / GENERATORS_OF_A_VERIFIER),
        }
        self.busy_s: dict[str, float] = dict.fromkeys(("controller", "generators", "verifiers", "learner"), 0.0)
        self.events: list[tuple[float, int, Any, tuple[Any, ...]]] = []
        self.numbers = itertools.count()
        self.round_robin = itertools.cycle(range(len(self.free_at["verifiers"])))
        self.version = self.learned = 0
        self.rng = random.Random(0)
        self.answers = _Answers()
        self.arrow_before, self.arrow_most = pa.total_allocated_bytes(), 0
        self.complete: set[Ticket] = set()
        self.marks: list[tuple[float, dict[str, float]]] = []

    # What the pipeline calls

    def send(self, prompts: pa.Table, spec: SamplingSpec) -> Ticket:
        self.enter()
        generators = len(self.free_at["generators"])
        ticket = self.timed(free_ticket, prompts, spec, generators, TASK_PROMPTS * GROUP)
        self.timed(self.scheduler.send, ticket.tasks)
        self.assign()
        self.leave()
        return ticket

    def receive(self, ticket: Ticket) -> tuple[pa.Table, pa.Table, dict[str, float]]:
        self.enter()
        while ticket not in self.complete:
            self.next_event()
        self.complete.remove(ticket)
        tables = self.timed(ticket.tables)
        self.leave()
        return *tables, {"sample_s": 1.0, "verify_s": 0.0}

    def update(self, samples: pa.Table, spec: Any) -> dict[str, float]:
        self.enter()
        end = self.now + self.update_s
        self.busy_s["learner"] += self.update_s
        while self.events and self.events[0][0] < end:
            self.next_event()
        self.now = max(self.now, end)
        self.learned += 1
        self.leave()
        return {"loss": 0.0, "grad_norm": 0.0}

    def hand_over(self) -> None:
        self.enter()
        self.version = self.learned
        for generator in range(len(self.free_at["generators"])):
            self.work(self.costs.hand_over_s)
            self.occupy("generators", generator, HAND_OVER_S)
        self.leave()

    def step(self, metrics: dict[str, Any]) -> None:
        self.enter()
        self.marks.append((self.now, dict(self.busy_s)))
        self.leave()

    def stage(self, label: str, kind: str, steps: int) -> None: ...
    def phase(self, text: str) -> None: ...
    def note(self, text: str) -> None:
        raise AssertionError(text)

    # The clock

    def enter(self) -> None:
        """The pipeline has run since `leave`."""
        self.work(time.perf_counter() - self.left)
        self.arrow_most = max(self.arrow_most, pa.total_allocated_bytes())

    def leave(self) -> None:
        self.left = time.perf_counter()

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.busy_s["controller"] += seconds

    def timed(self, function: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        self.work(time.perf_counter() - began)
        return result

    def occupy(self, what: str, index: int, seconds: float) -> float:
        """When the work that is asked for now ends: behind all that was asked for before."""
        end = max(self.now, self.free_at[what][index]) + seconds
        self.free_at[what][index] = end
        self.busy_s[what] += seconds
        return end

    def at(self, when: float, handle: Any, *arguments: Any) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), handle, arguments))

    def next_event(self) -> None:
        when, _, handle, arguments = heapq.heappop(self.events)
        self.now = max(self.now, when)  # later where the controller was busy
        handle(*arguments)

    # What happens

    def assign(self) -> None:
        for generator, task in self.timed(self.scheduler.assign):
            self.work(self.costs.task_s / 3)
            seconds = TASK_S * math.exp(self.rng.gauss(-(TASK_SPREAD**2) / 2, TASK_SPREAD))
            self.at(self.occupy("generators", generator, seconds), self.sampled, generator, task, self.version)

    def sampled(self, generator: int, task: Task, version: int) -> None:
        self.work(self.costs.task_s / 3)
        self.timed(self.scheduler.finished, generator, task)
        self.assign()
        rollouts, verdicts = self.answers.of(task.prompts, version)
        end = self.occupy("verifiers", next(self.round_robin), self.costs.verify_s)
        self.at(end, self.verified, task, rollouts, verdicts)

    def verified(self, task: Task, rollouts: pa.Table, verdicts: pa.Table) -> None:
        self.work(self.costs.task_s / 3)
        if self.timed(task.ticket.answer, task, rollouts, verdicts):
            self.complete.add(task.ticket)

    def summary(self, steps: list[tuple[float, dict[str, float]]]) -> dict[str, Any]:
        (began, before), (ended, after) = steps[0], steps[-1]
        rollouts = (len(steps) - 1) * TASK_PROMPTS * GROUP * len(self.free_at["generators"])
        number = {what: len(self.free_at.get(what, [0])) for what in before}
        busy = {what: (after[what] - before[what]) / (ended - began) / number[what] for what in before}
        busiest = max(busy, key=lambda what: busy[what])
        return {
            "rate": rollouts / (ended - began),
            "busy": busy,
            "us": (after["controller"] - before["controller"]) / rollouts * 1e6,
            "mib": (self.arrow_most - self.arrow_before) / 2**20,
            "limit": busiest if busy[busiest] >= BUSY else "stragglers",
        }


# What stands in for data, tokenizer and engines


def _examples(count: int) -> pa.Table:
    rows = (
        records.example(
            model_type="task_llm", task="sums", prompt=f"problem {n}", steps=[EXPERT], reference="45", verifier="number"
        )
        for n in range(count)
    )
    return records.build("Example", rows)


class _Tokenizer:
    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return "\n".join(message["content"] for message in messages)

    def __call__(self, *_: object, **__: object) -> dict[str, list[int]]:
        return {"input_ids": list(range(PROMPT_TOKENS))}


class _Answers:
    """Rollouts and verdicts of real size for any prompts: a few made by `records.build`, copied under other ids."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.made = itertools.cycle([self._make(rng) for _ in range(8)])

    def of(self, prompts: pa.Table, version: int) -> tuple[pa.Table, pa.Table]:
        rollouts, verdicts = (table.take(pa.array(range(table.num_rows))) for table in next(self.made))
        ids = pa.array(np.repeat(prompts["id"].to_numpy(), GROUP), pa.string())
        versions = pa.array(np.full(len(ids), version), pa.int64())
        rollouts = rollouts.set_column(0, records.ROLLOUT.field(0), ids)
        rollouts = rollouts.set_column(2, records.ROLLOUT.field(2), versions)
        return rollouts, verdicts.set_column(0, records.VERDICT.field(0), ids)

    def _make(self, rng: np.random.Generator) -> tuple[pa.Table, pa.Table]:
        rollouts, verdicts = [], []
        for p, g in itertools.product(range(TASK_PROMPTS), range(GROUP)):
            key = {"prompt_id": str(p), "sample_index": g}
            tokens = rng.integers(0, 49152, COMPLETION_TOKENS)
            text = EXPERT[: rng.integers(40, len(EXPERT))] + str(rng.integers(10**6))
            rollouts.append(
                key | {"policy_version": 0, "token_ids": tokens.tolist(), "text": text, "finish_reason": "stop",
                       "logprobs": rng.normal(-1, 0.5, COMPLETION_TOKENS).tolist()}
            )  # fmt: skip
            reward = float(rng.random())
            verdicts.append(
                key | {"outcome": "scored", "reward": reward, "components": '{"similarity": 0.5}', "detail": ""}
            )
        return records.build("Rollout", rollouts), records.build("Verdict", verdicts)


def _prompts(count: int) -> pa.Table:
    whole = {"stage": "srl", "step_index": 0, "offset": PROMPT_TOKENS, "token_ids": list(range(PROMPT_TOKENS))}
    judged = {"verifier": "similarity", "reference": EXPERT, "metadata": '{"measure": "characters", "think": false}'}
    rows = ({"id": str(p), "example_id": str(p), "trunk_id": str(p)} | whole | judged for p in range(count))
    return records.build("Prompt", rows)


# What is measured first


def _verifier_cost(tasks: int) -> float:
    """Seconds of one verifier actor (two processes) for one task under the similarity reward."""
    from srl_rlvr.verifiers.pool import VerifierPool

    prompts = _prompts(TASK_PROMPTS)
    answers = _Answers()
    with VerifierPool(workers=2, deadline_s=10.0) as pool:
        pool.score(prompts, answers.of(prompts, 0)[0])
        began = time.perf_counter()
        for _ in range(tasks):
            pool.score(prompts, answers.of(prompts, 0)[0])
        return (time.perf_counter() - began) / tasks


def _ray_costs(tasks: int) -> tuple[float, float]:
    """The driver's CPU seconds for one task and for one hand-over: the real Dispatcher, actors that answer at once."""
    import logging

    import ray

    from actors.dispatcher import Dispatcher
    from srl_rlvr.policies.weights import Manifest

    prompts = _prompts(TASK_PROMPTS)
    rollouts, verdicts = _Answers().of(prompts, 0)

    class Instant:
        def generate(self, prompts: pa.Table, spec: SamplingSpec) -> pa.Table:
            return rollouts

        def score(self, prompts: pa.Table, rollouts: pa.Table) -> pa.Table:
            return verdicts

        def load(self, buffer: Any, manifest: Manifest) -> tuple[int, str]:
            return manifest.version, manifest.checksum

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        actors = [ray.remote(Instant).remote() for _ in range(6)]
        dispatcher = Dispatcher(actors[:4], actors[4:], configs.EngineConfig(), lambda: None)

        def run(count: int) -> float:
            ticket = free_ticket(_prompts(TASK_PROMPTS * count), SamplingSpec(GROUP, 1.0, 64), 4, TASK_PROMPTS * GROUP)
            began = time.process_time()
            dispatcher.send(ticket)
            dispatcher.receive(ticket)
            return (time.process_time() - began) / count

        run(20)
        task_s = run(tasks)
        weights = [ray.put(np.zeros(1))], Manifest(0, (), "checksum")
        dispatcher.hand_over(weights, until_served=True)
        began = time.process_time()
        for _ in range(tasks // 10):
            dispatcher.hand_over(weights, until_served=True)
        hand_over_s = (time.process_time() - began) / (tasks // 10) / 4
        dispatcher.close()
    finally:
        ray.shutdown()
    return task_s, hand_over_s


if __name__ == "__main__":
    main()
