"""Starts the actors, names them, watches them, and gives the pipeline one object to drive: the Crew.

Every wait has a deadline and says what it waited for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster import NAMESPACE, connect, worker_environment
from actors.dispatcher import Dispatcher, explained
from actors.generator import Generator
from actors.learner import Learner, LearnerSpec
from actors.verifier import Verifier
from srl_rlvr import engines, model_types, records
from srl_rlvr.config import RunConfig
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import InputError, RunError
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.scheduling import Ticket, exact_ticket, free_ticket

_PLACEMENT_DEADLINE_S = 60.0
_COMMIT_DEADLINE_S = 60.0


def demand(config: RunConfig) -> list[tuple[str, int, dict[str, float]]]:
    """(what, how many, resources of each) of everything that the run reserves."""
    cluster = config.cluster
    rows = [
        ("generator", config.engine.generators, {"CPU": cluster.cpus_per_generator, "GPU": cluster.gpus_per_generator}),
        ("learner worker", config.learner.workers, {"CPU": cluster.cpus_per_learner, "GPU": cluster.gpus_per_learner}),
    ]
    return [(what, n, {name: value for name, value in each.items() if value}) for what, n, each in rows]


def preflight(config: RunConfig, nodes: Sequence[Mapping[str, float]], runs: int = 1) -> str:
    """The demand of so many such runs and what the nodes have. Raises InputError where it can never fit."""
    rows = [(what, runs * n, each) for what, n, each in demand(config)]
    totals: dict[str, float] = {}
    for _, n, each in rows:
        for name, value in each.items():
            totals[name] = totals.get(name, 0.0) + n * value
    parts = [f"{n} {what} × {_amounts(each)}" for what, n, each in rows]
    supply = {name: sum(node.get(name, 0.0) for node in nodes) for name in totals}
    has = _amounts(supply)
    for name, wanted in totals.items():
        if wanted > supply[name]:
            raise InputError(
                f"the run does not fit: {', '.join(parts)} need {_amounts(totals)}, the cluster has {has}; lower "
                f"engine.generators or learner.workers, set cluster.{name.lower()}s_per_*, or add nodes"
            )
    for what, _, each in rows:
        if not any(all(node.get(name, 0.0) >= value for name, value in each.items()) for node in nodes):
            keys = " or ".join(f"cluster.{name.lower()}s_per_{what.split()[0]}" for name in each)
            raise InputError(
                f"the run does not fit: a {what} needs {_amounts(each)}, and no node has that; lower {keys}"
            )
    return f"demand: {', '.join(parts)} = {_amounts(totals)}; supply: {has}"


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{value:g} {name}" for name, value in resources.items()) or "nothing"


class Crew:
    """The actors of one run. `sample`, `update` and the rest are what the pipeline knows of Ray."""

    def __init__(self, config: RunConfig, model: str, run_id: str, storage: Path):
        """`model` is the base's name or whole path (`base_models.for_all_nodes`): each actor finds it on its node."""
        self.config = config
        self._in_turn = config.max_staleness == 0
        bundles = [each for what, n, each in demand(config) if what == "generator" for _ in range(n)]
        self.group = placement_group(bundles, strategy="PACK", name=run_id)
        if not self.group.wait(_PLACEMENT_DEADLINE_S):
            remove_placement_group(self.group)
            raise RunError(
                f"no room for {len(bundles)} generators within {_PLACEMENT_DEADLINE_S:.0f} s: other jobs hold the "
                "cluster's resources; wait for them, or see `ray status`"
            )
        engine = config.engine
        kind, arguments = engine_of(config)
        self.generators = [
            Generator.options(  # type: ignore[attr-defined]
                name=f"{run_id}/generator-{i}",
                namespace=NAMESPACE,
                num_cpus=config.cluster.cpus_per_generator,
                num_gpus=config.cluster.gpus_per_generator,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=i),
                runtime_env=worker_environment(config.cluster.gpus_per_generator, _threads(config)[0]),
            ).remote(kind, model, arguments, config.model_type, config.model.max_context)
            for i in range(engine.generators)
        ]
        self.verifiers = [
            Verifier.options(name=f"{run_id}/verifier-{i}", namespace=NAMESPACE, num_cpus=0).remote(  # type: ignore[attr-defined]
                config.verifier.workers, config.verifier.deadline_s
            )
            for i in range(config.verifier.actors)
        ]
        self.learner = Learner.options(name=f"{run_id}/learner", namespace=NAMESPACE, max_concurrency=64).remote(  # type: ignore[attr-defined]
            _learner_spec(config, model, storage)
        )
        self.dispatcher = Dispatcher(
            self.generators, self.verifiers, engine, lambda: self.learner.call.remote("export", {})
        )

    def wait_until_ready(self) -> list[str]:
        """Block until every engine and the worker group answer; returns what the user should know of this model.

        Raises RunError naming who did not start, and why.
        """
        deadline = self.config.engine.start_deadline_s
        for i, generator in enumerate(self.generators):
            self._get(
                generator.health.remote(), deadline, f"generator-{i} to start its {engine_of(self.config)[0]} engine"
            )
        for i, verifier in enumerate(self.verifiers):
            self._get(verifier.health.remote(), deadline, f"verifier-{i} to start")
        # Every worker answers only once it holds the model.
        return self._learner("notices", {}, self.config.learner.start_deadline_s)

    def sample(self, prompts: pa.Table, spec: SamplingSpec) -> tuple[pa.Table, pa.Table, dict[str, float]]:
        """Rollouts and verdicts of `prompts`, in their order, and the seconds that each took."""
        return self.receive(self.send(prompts, spec))

    def send(self, prompts: pa.Table, spec: SamplingSpec) -> Ticket:
        """Have `prompts` sampled and verified; `receive` has the answers.

        Prompts of one trunk go to one generator, whose cache then holds their prefix; each task is verified while
        others are still sampled.
        """
        if self._in_turn:
            ticket = exact_ticket(prompts, spec, len(self.generators))
        else:
            ticket = free_ticket(prompts, spec, len(self.generators), self.config.engine.max_running)
        self.dispatcher.send(ticket)
        return ticket

    def receive(self, ticket: Ticket) -> tuple[pa.Table, pa.Table, dict[str, float]]:
        """Block until all of the ticket is there: rollouts and verdicts in the order of its prompts, and seconds."""
        seconds = self.dispatcher.receive(ticket)
        return *ticket.tables(), seconds

    def update(self, samples: pa.Table, spec: UpdateSpec) -> dict[str, float]:
        """One update of the policy; returns its metrics."""
        return self._learner("update", {"samples": [ray.put(records.check("Sample", samples))], "spec": spec})

    def begin_stage(self, keep_reference: bool) -> None:
        self._learner("begin_stage", {"keep_reference": keep_reference})

    def hand_over(self) -> None:
        """The learner's weights to every generator, which has to echo them (RunError where it serves something else).

        In turn, all have echoed when this returns. Otherwise each loads them after the task that it is at, and
        no more than max_staleness + 1 buffers are alive: a generator that is behind holds up the admission of more.
        """
        if self._in_turn:
            self.dispatcher.weights = None  # the old buffer leaves the object store before the new one comes
        self.dispatcher.hand_over(self._learner("export", {}), until_served=self._in_turn)

    def save(self, folder: Path) -> None:
        self._learner("save", {"folder": str(folder.resolve())})

    def commit(self, folder: Path) -> None:
        """What was saved last now stands, whole, as `folder`: a worker group that dies starts anew from there."""
        self._get(
            self.learner.commit.remote(str(folder.resolve())), _COMMIT_DEADLINE_S, "the learner to note a checkpoint"
        )

    def load(self, folder: Path, version: int | None = None) -> None:
        """What `save` wrote; from then on it counts as `version`, or as the version that it had."""
        self._learner("load", {"folder": str(folder.resolve()), "version": version})

    def save_model(self, folder: Path, card: dict[str, Any]) -> None:
        self._learner("save_model", {"folder": str(folder), "card": card})

    def close(self) -> None:
        """Stop the worker group and the actors. What does not stop in time is killed."""
        self.dispatcher.close()
        refs = [self.learner.call.remote("stop", {})]
        ray.wait(refs, timeout=10)
        for actor in [*self.generators, *self.verifiers, self.learner]:
            ray.kill(actor)
        remove_placement_group(self.group)

    def _learner(self, command: str, arguments: dict[str, Any], deadline_s: float | None = None) -> Any:
        deadline = deadline_s or self.config.learner.call_deadline_s
        return self._get(self.learner.call.remote(command, arguments), deadline, f"the learner's {command}")

    def _get(self, ref: Any, deadline_s: float, what: str) -> Any:
        with explained(deadline_s, what):
            return ray.get(ref, timeout=deadline_s)


def engine_of(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """The kind of the run's engine and its arguments."""
    model_type, engine = model_types.find(config.model_type), config.engine
    kind = model_type.engine or engine.kind
    max_context, tokens_per_pass = config.model.max_context, config.learner.tokens_per_microbatch
    arguments = engines.arguments(kind, engine, max_context, tokens_per_pass) | model_type.policy_options()
    return kind, arguments | ({"matmul": config.model.matmul} if kind == "transformers" else {})


def _threads(config: RunConfig) -> tuple[int, int]:
    """CPU threads of one generator and of one learner worker.

    Where they take turns each side may have all cores; where they overlap, each has what Ray reserves for it.
    """
    engine, learner, cluster = config.engine, config.learner, config.cluster
    if config.max_staleness:
        unset = int(cluster.cpus_per_generator), int(cluster.cpus_per_learner)
    else:
        cores = os.cpu_count() or 1
        unset = cores, cores // learner.workers
    return engine.threads or max(1, unset[0]), learner.threads or max(1, unset[1])


def _learner_spec(config: RunConfig, model: str, storage: Path) -> LearnerSpec:
    learner = config.learner
    gpus = config.cluster.gpus_per_learner
    fsdp = learner.strategy == "fsdp" or (learner.strategy == "auto" and gpus > 0 and learner.workers > 1)
    model_type = model_types.find(config.model_type)
    policy = model_type.policy_options() | {
        "tokens_per_microbatch": learner.tokens_per_microbatch,
        "weight_decay": learner.weight_decay,
        "max_grad_norm": learner.max_grad_norm,
    }
    if config.model.dimensions:
        policy["dimensions"] = config.model.dimensions
    if model_type.policy == "text":
        policy |= {
            "lora_rank": config.model.lora_rank,
            "lora_alpha": config.model.lora_alpha,
            "matmul": config.model.matmul,
            "activation_checkpointing": learner.activation_checkpointing,
            "strategy": "fsdp" if fsdp else "ddp",
            "seed": config.seed,
        }
    return LearnerSpec(
        model=model,
        policy_kind=model_type.policy,
        policy=policy,
        workers=learner.workers,
        threads=_threads(config)[1],
        cpus=config.cluster.cpus_per_learner,
        gpus=gpus,
        max_restarts=learner.max_restarts,
        storage=str(storage),
        runtime_env=worker_environment(gpus, _threads(config)[1]),
    )


def start_ray(config: RunConfig, notify: Callable[[str], None], runs: int = 1) -> bool:
    """Join the cluster that is asked for, or start a local one with room for so many runs; returns whether it is local.

    Raises InputError where the cluster cannot be reached or they cannot fit.
    """
    needed = math.ceil(runs * sum(n * each.get("CPU", 0) for _, n, each in demand(config)))
    local = connect(config.cluster.address, max(os.cpu_count() or 1, needed), config.cluster.dashboard)
    notify(preflight(config, [node["Resources"] for node in ray.nodes() if node["Alive"]], runs))
    return local
