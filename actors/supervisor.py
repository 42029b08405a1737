"""Starts the actors, names them, watches them, and gives the pipeline one object to drive: the Crew.

Every wait has a deadline and says what it waited for. A generator that dies is restarted, is handed the newest
weights, and its prompts are sent out again.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import ray
import ray.exceptions
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.generator import Generator
from actors.learner import Learner, LearnerSpec
from actors.verifier import Verifier
from srl_rlvr import records
from srl_rlvr.config import RunConfig
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import InputError, RunError
from srl_rlvr.policies.losses import UpdateSpec

NAMESPACE = "srl-rlvr"
_PLACEMENT_DEADLINE_S = 60.0
_GENERATOR_TRIES = 3
_COMMIT_DEADLINE_S = 60.0
_RESTART_POLL_S = 0.5
_CONNECT_DEADLINE_S = 5.0


def demand(config: RunConfig) -> list[tuple[str, int, dict[str, float]]]:
    """(what, how many, resources of each) of everything that the run reserves."""
    cluster = config.cluster
    rows = [
        ("generator", config.engine.generators, {"CPU": cluster.cpus_per_generator, "GPU": cluster.gpus_per_generator}),
        ("learner worker", config.learner.workers, {"CPU": cluster.cpus_per_learner, "GPU": cluster.gpus_per_learner}),
    ]
    return [(what, n, {name: value for name, value in each.items() if value}) for what, n, each in rows]


def preflight(config: RunConfig, supply: Mapping[str, float]) -> str:
    """The demand and supply as a line each. Raises InputError where the demand can never fit."""
    rows = demand(config)
    totals: dict[str, float] = {}
    for _, n, each in rows:
        for name, value in each.items():
            totals[name] = totals.get(name, 0.0) + n * value
    parts = [f"{n} {what} × {_amounts(each)}" for what, n, each in rows]
    has = _amounts({name: supply.get(name, 0.0) for name in totals})
    for name, wanted in totals.items():
        if wanted > supply.get(name, 0.0):
            raise InputError(
                f"the run does not fit: {', '.join(parts)} need {_amounts(totals)}, the cluster has {has}; lower "
                f"engine.generators or learner.workers, set cluster.{name.lower()}s_per_*, or add nodes"
            )
    return f"demand: {', '.join(parts)} = {_amounts(totals)}; supply: {has}"


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{value:g} {name}" for name, value in resources.items()) or "nothing"


class Crew:
    """The actors of one run. `sample`, `update` and the rest are what the pipeline knows of Ray."""

    def __init__(self, config: RunConfig, model: Path, run_id: str, storage: Path):
        self.config = config
        self.waiting_for = "nothing"
        cores = os.cpu_count() or 1
        bundles = [each for what, n, each in demand(config) if what == "generator" for _ in range(n)]
        self.group = placement_group(bundles, strategy="PACK", name=run_id)
        if not self.group.wait(_PLACEMENT_DEADLINE_S):
            remove_placement_group(self.group)
            raise RunError(
                f"no room for {len(bundles)} generators within {_PLACEMENT_DEADLINE_S:.0f} s: other jobs hold the "
                "cluster's resources; wait for them, or see `ray status`"
            )
        engine = config.engine
        arguments = {
            "max_running": engine.max_running,
            "max_context": config.model.max_context,
            "kv_cache_gib": engine.kv_cache_gib,
            "block_size": engine.block_size,
        }
        self.generators = [
            Generator.options(  # type: ignore[attr-defined]
                name=f"{run_id}/generator-{i}",
                namespace=NAMESPACE,
                num_cpus=config.cluster.cpus_per_generator,
                num_gpus=config.cluster.gpus_per_generator,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=i),
                runtime_env=cpu_allocator(config.cluster.gpus_per_generator),
            ).remote(engine.kind, str(model), arguments, engine.threads or cores)
            for i in range(engine.generators)
        ]
        self.verifier = Verifier.options(name=f"{run_id}/verifier", namespace=NAMESPACE, num_cpus=0).remote(  # type: ignore[attr-defined]
            config.verifier.workers, config.verifier.deadline_s
        )
        self.learner = Learner.options(name=f"{run_id}/learner", namespace=NAMESPACE, max_concurrency=64).remote(  # type: ignore[attr-defined]
            _learner_spec(config, model, storage, cores)
        )
        self.weights: tuple[list[Any], Any] | None = None

    def wait_until_ready(self) -> None:
        """Block until every engine and the worker group answer. Raises RunError naming who did not start, and why."""
        deadline = self.config.engine.start_deadline_s
        for i, generator in enumerate(self.generators):
            self._get(
                generator.health.remote(), deadline, f"generator-{i} to start its {self.config.engine.kind} engine"
            )
        self._get(self.verifier.health.remote(), deadline, "the verifier to start")
        # An export is the cheapest command that proves that all workers hold the model.
        self._learner("export", {}, self.config.learner.start_deadline_s)

    def sample(self, prompts: pa.Table, spec: SamplingSpec) -> tuple[pa.Table, pa.Table, dict[str, float]]:
        """Rollouts and verdicts of `prompts`, in their order, and the seconds that each took.

        Prompts of one trunk go to one generator, whose cache then holds their prefix; each generator's rollouts are
        verified while the others still sample.
        """
        started = time.monotonic()
        shards = _by_trunk(prompts, len(self.generators))
        rollouts = [self.generators[i].generate.remote(shard, spec) for i, shard in shards]
        verdicts = [self.verifier.score.remote(shard, ref) for (_, shard), ref in zip(shards, rollouts, strict=True)]
        deadline = self.config.engine.call_deadline_s
        tables, sampled_s = [], 0.0
        for index, (i, shard) in enumerate(shards):
            tables.append(self._rollouts(i, shard, spec, rollouts[index], deadline))
            sampled_s = time.monotonic() - started
            if tables[-1][1]:  # sampled anew: its verdicts have to be, too
                verdicts[index] = self.verifier.score.remote(shard, tables[-1][0])
        scores = [self._get(ref, deadline, "verdicts") for ref in verdicts]
        seconds = {"sample_s": sampled_s, "verify_s": time.monotonic() - started - sampled_s}
        return records.concat("Rollout", [table for table, _ in tables]), records.concat("Verdict", scores), seconds

    def update(self, samples: pa.Table, spec: UpdateSpec) -> dict[str, float]:
        """One update of the policy; returns its metrics."""
        return self._learner("update", {"samples": [ray.put(records.check("Sample", samples))], "spec": spec})

    def begin_stage(self, keep_reference: bool) -> None:
        self._learner("begin_stage", {"keep_reference": keep_reference})

    def hand_over(self) -> None:
        """The learner's weights to every generator. Raises RunError where one serves something else afterwards."""
        self.weights = None  # the old buffer leaves the object store before the new one comes
        self.weights = self._learner("export", {})
        for i in range(len(self.generators)):
            self._load(i)

    def save(self, folder: Path) -> None:
        self._learner("save", {"folder": str(folder.resolve())})

    def commit(self, folder: Path) -> None:
        """What was saved last now stands, whole, as `folder`: a worker group that dies starts anew from there."""
        self._get(
            self.learner.commit.remote(str(folder.resolve())), _COMMIT_DEADLINE_S, "the learner to note a checkpoint"
        )

    def load(self, folder: Path) -> None:
        self._learner("load", {"folder": str(folder.resolve())})

    def save_model(self, folder: Path, card: dict[str, Any]) -> None:
        self._learner("save_model", {"folder": str(folder), "card": card})

    def close(self) -> None:
        """Stop the worker group and the actors. What does not stop in time is killed."""
        refs = [self.learner.call.remote("stop", {})]
        ray.wait(refs, timeout=10)
        for actor in [*self.generators, self.verifier, self.learner]:
            ray.kill(actor)
        remove_placement_group(self.group)

    def _rollouts(
        self, i: int, shard: pa.Table, spec: SamplingSpec, ref: Any, deadline: float
    ) -> tuple[pa.Table, bool]:
        """The shard's rollouts, and whether they had to be sampled anew because the generator died.

        One that died between two calls is up again unnoticed, and samples from the base weights: its version tells.
        """
        for attempt in range(_GENERATOR_TRIES):
            try:
                table = self._get(ref, deadline, f"rollouts of {shard.num_rows} prompts from generator-{i}")
                if set(records.check("Rollout", table)["policy_version"].to_pylist()) == {self.version}:
                    return table, attempt > 0
            except ray.exceptions.ActorUnavailableError:
                self._await_restart(i)
            if self.weights is not None:
                self._load(i)
            ref = self.generators[i].generate.remote(shard, spec)
        raise RunError(f"generator-{i} died {_GENERATOR_TRIES} times over the same {shard.num_rows} prompts")

    @property
    def version(self) -> int:
        """Of the weights that the generators should serve; 0 are the base weights that they start with."""
        return self.weights[1].version if self.weights is not None else 0

    def _load(self, i: int) -> None:
        """Hand the newest weights to generator i, again where it died or where their owner, a learner worker, did."""
        for _ in range(_GENERATOR_TRIES):
            assert self.weights is not None
            (buffer,), manifest = self.weights
            what = f"generator-{i} to load version {manifest.version}"
            try:
                served = self._get(
                    self.generators[i].load.remote(buffer, manifest), self.config.engine.call_deadline_s, what
                )
            except ray.exceptions.ActorUnavailableError:
                self._await_restart(i)
                continue
            except ray.exceptions.ObjectLostError:
                self.weights = self._learner("export", {})
                continue
            if served != (manifest.version, manifest.checksum):
                raise RunError(
                    f"generator-{i} serves version and checksum {served}, not {manifest.version}, {manifest.checksum}: "
                    "the hand-over of weights went wrong"
                )
            return
        raise RunError(f"generator-{i} died {_GENERATOR_TRIES} times over loading version {self.version}")

    def _await_restart(self, i: int) -> None:
        """Block until generator i, which died, answers again: until then Ray turns every call away at once."""
        deadline_s = self.config.engine.start_deadline_s
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            try:
                self._get(self.generators[i].health.remote(), deadline_s, f"generator-{i} to start again")
                return
            except ray.exceptions.ActorUnavailableError:
                time.sleep(_RESTART_POLL_S)
        raise RunError(f"generator-{i} died and did not start again within {deadline_s:.0f} s")

    def _learner(self, command: str, arguments: dict[str, Any], deadline_s: float | None = None) -> Any:
        deadline = deadline_s or self.config.learner.call_deadline_s
        return self._get(self.learner.call.remote(command, arguments), deadline, f"the learner's {command}")

    def _get(self, ref: Any, deadline_s: float, what: str) -> Any:
        self.waiting_for = what
        try:
            return ray.get(ref, timeout=deadline_s)
        except ray.exceptions.GetTimeoutError:
            raise RunError(f"waited {deadline_s:.0f} s for {what}; see `ray status` and the actor's log") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError | RunError):
                raise error.cause from None
            if isinstance(error.cause, ray.exceptions.RayError):
                raise error.cause from error
            first = (str(error.cause).strip() or "no message").splitlines()[0]
            raise RunError(f"waited for {what}: {type(error.cause).__name__}: {first}") from error
        except ray.exceptions.ActorDiedError as error:
            raise RunError(f"waited for {what}, and the actor died: {_last_line(error)}") from error


def _learner_spec(config: RunConfig, model: Path, storage: Path, cores: int) -> LearnerSpec:
    learner = config.learner
    gpus = config.cluster.gpus_per_learner
    fsdp = learner.strategy == "fsdp" or (learner.strategy == "auto" and gpus > 0 and learner.workers > 1)
    return LearnerSpec(
        model=str(model),
        policy={
            "lora_rank": config.model.lora_rank,
            "lora_alpha": config.model.lora_alpha,
            "tokens_per_microbatch": learner.tokens_per_microbatch,
            "activation_checkpointing": learner.activation_checkpointing,
            "weight_decay": learner.weight_decay,
            "max_grad_norm": learner.max_grad_norm,
            "strategy": "fsdp" if fsdp else "ddp",
            "seed": config.seed,
        },
        workers=learner.workers,
        threads=learner.threads or max(1, cores // learner.workers),
        cpus=config.cluster.cpus_per_learner,
        gpus=gpus,
        max_restarts=learner.max_restarts,
        storage=str(storage),
        runtime_env=cpu_allocator(gpus),
    )


def cpu_allocator(gpus: float) -> dict[str, Any]:
    """The runtime environment of a process that computes on CPUs: with the jemalloc that Ray brings.

    torch asks for aligned blocks, whose room glibc before 2.38 does not find again when they are freed: that alone
    is 0.7 GiB of a learner's peak at 135M parameters.
    """
    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if gpus or "LD_PRELOAD" in os.environ or not library.is_file():
        return {}
    return {"env_vars": {"LD_PRELOAD": str(library)}}


def _by_trunk(prompts: pa.Table, generators: int) -> list[tuple[int, pa.Table]]:
    """(generator, its prompts): trunks dealt out whole and in order, so that the shards put together keep the order."""
    trunk_ids = prompts["trunk_id"].to_pylist()
    starts = [i for i in range(len(trunk_ids)) if i == 0 or trunk_ids[i] != trunk_ids[i - 1]] + [len(trunk_ids)]
    trunks = len(starts) - 1
    shards = []
    for i in range(generators):
        first, end = starts[trunks * i // generators], starts[trunks * (i + 1) // generators]
        if end > first:
            # A slice is copied: Ray would ship the whole table behind it.
            shards.append((i, prompts.take(pa.array(range(first, end)))))
    return shards


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


def start_ray(config: RunConfig, notify: Callable[[str], None]) -> bool:
    """Join the cluster that is asked for, or start a local one; returns whether it is local.

    Raises InputError where the cluster cannot be reached or the run cannot fit.
    """
    address = config.cluster.address or os.environ.get("RAY_ADDRESS", "")
    local = not address
    needed = math.ceil(sum(n * each.get("CPU", 0) for _, n, each in demand(config)))
    if not local:
        check_reachable(address)
    try:
        if local:
            ray.init(
                address="local",  # a stale address of another cluster must not capture a local run
                num_cpus=max(os.cpu_count() or 1, needed),
                include_dashboard=config.cluster.dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace=NAMESPACE,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = "a local Ray" if local else f"the Ray cluster at '{address}'"
        hint = "see its log" if local else "is it running, and is RAY_AUTH_MODE/RAY_AUTH_TOKEN_PATH set as on its head?"
        raise InputError(f"cannot reach {where}: {str(error).strip().splitlines()[0]}; {hint}") from None
    notify(preflight(config, ray.cluster_resources()))
    return local


def check_reachable(address: str) -> None:
    """Raises InputError where no Ray cluster answers at `address`: Ray itself would try for minutes, without a word."""
    if address in ("auto", "local"):
        return
    parts = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    if parts is None:
        raise InputError(f"'{address}' is no address of a Ray cluster: write HOST:6379, ray://HOST:10001 or auto")
    try:
        socket.create_connection((parts[1], int(parts[2])), _CONNECT_DEADLINE_S).close()
        if os.environ.get("RAY_USE_TLS", "0") == "0":  # with certificates, Ray itself has to shake hands
            with grpc.insecure_channel(f"{parts[1]}:{parts[2]}") as channel:
                grpc.channel_ready_future(channel).result(_CONNECT_DEADLINE_S)
    except (OSError, OverflowError, grpc.FutureTimeoutError) as error:
        silent = "what listens there does not answer as Ray does"
        cause = silent if isinstance(error, grpc.FutureTimeoutError) else getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot reach the Ray cluster at '{address}': {cause}; start it (`ray start --head`), or correct "
            "cluster.address or RAY_ADDRESS"
        ) from None
