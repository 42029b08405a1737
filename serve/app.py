"""Deploys: one Ray Serve application for each model, and the gateway before them.

`srl-rlvr serve` listens itself (`gateway_of`): Ray Serve's proxy would double the time that is added to a request. On a
cluster the gateway is an application as well, behind the proxy: `applications` is that whole deployment as the config
file of Ray Serve, which `serve deploy` and KubeRay's RayService take.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.api import RunTarget
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from actors.cluster import worker_environment
from serve import ENVIRONMENT, kinds, traffic
from serve.config import DRAIN_S, GatewaySettings, ModelEntry, ServeConfig, Served
from serve.errors import Refusal
from serve.together import Together
from srl_rlvr import trained
from srl_rlvr.errors import InputError
from srl_rlvr.examples import shown

GATEWAY = "gateway"
_TRIES = 2  # of a call whose replica died under it: an answer has no effect but itself
_STREAMS_AT_ONCE = 1000


def grouped(models: Sequence[ModelEntry]) -> list[list[ModelEntry]]:
    """Those that share a base together, each other by itself."""
    of: dict[str, list[ModelEntry]] = {}
    for entry in models:
        of.setdefault(f"base {entry.base}" if entry.base else f"name {entry.name}", []).append(entry)
    return list(of.values())


def share_cores(models: Sequence[ModelEntry], cores: int) -> None:
    """Each gets its part of one machine: engines with more threads than cores wait for each other."""
    replicas = [group[0].replicas for group in grouped(models)]
    part = max(1, cores // sum(few if isinstance(few, int) else few[0] for few in replicas))
    for entry in models:
        entry.threads = entry.threads or part


def application_of(group: Sequence[ModelEntry]) -> str:
    """Its name."""
    return f"shared-{group[0].name}" if group[0].base else group[0].name


def served(entry: ModelEntry) -> Served:
    """What its folder says. Raises InputError where it holds no such model."""
    model = trained.read(Path(entry.path))
    made = int((Path(entry.path) / "config.json").stat().st_mtime)
    model_type = model.model_type
    fixed = entry.replicas if isinstance(entry.replicas, int) else 0
    if entry.base:
        if model_type.policy == "ranking" or model.engine_kind(entry.engine) != "vllm":
            raise InputError(f"model '{entry.name}' cannot share a base: only types that write text by vLLM can, and "
                             f"it is {model_type.name} by {model.engine_kind(entry.engine)}")  # fmt: skip
        trained.adapter_of(Path(entry.path), Path(entry.base))
    return Served(
        name=entry.name,
        model_type=model_type.name,
        policy=model_type.policy,
        created=made,
        kind=kinds.kind_of(model_type),
        max_tokens=entry.max_tokens or model.max_tokens,
        example=shown.readable(model.card.get("example")),
        batches=fixed if model_type.policy == "ranking" else 0,
        queue=entry.queue,
    )


def build(models: Sequence[ModelEntry] | dict[str, Any]) -> ray_serve.Application:
    """The application of a model, or of models that share a base. Ray Serve gives what its config file has: a dict."""
    from serve.replicas import Encoder, PlainWriter
    from serve.vllm_writers import SharedWriters, VllmWriter

    given = models["models"] if isinstance(models, dict) else models
    entries = [ModelEntry.model_validate(entry) for entry in given]
    entry, model = entries[0], trained.read(Path(entries[0].path))
    holder: Any = PlainWriter
    if entry.base:
        holder = SharedWriters
    elif model.model_type.policy == "ranking":
        holder = Encoder
    elif model.engine_kind(entry.engine) == "vllm":
        holder = VllmWriter
    low, high = (entry.replicas, entry.replicas) if isinstance(entry.replicas, int) else entry.replicas
    how: dict[str, Any] = {"num_replicas": low}
    if high > low:
        how = {
            "autoscaling_config": {
                "min_replicas": low, "max_replicas": high, "target_ongoing_requests": entry.target_ongoing
            }
        }  # fmt: skip
    deployment = ray_serve.deployment(
        holder,
        name=application_of(entries),
        max_ongoing_requests=4 * entry.max_running,
        max_queued_requests=entry.queue,
        graceful_shutdown_timeout_s=DRAIN_S,
        health_check_period_s=5,
        ray_actor_options={
            "num_cpus": entry.cpus,
            "num_gpus": entry.gpus,
            "runtime_env": worker_environment(entry.gpus, entry.threads or os.cpu_count() or 1),
        },
        **how,
    )
    return deployment.bind(entries if entry.base else entry)


def gateway_of(settings: GatewaySettings, says_id: bool = True) -> Any:
    """The ASGI application that finds the models on this Ray."""
    from serve.gateway import create_app

    shares: dict[str, traffic.Shares] = {}
    models = {model.name: model for model in settings.models}

    @functools.cache
    def replica_of(application: str, model: str) -> HandleReplica:
        return HandleReplica(application, models[model])

    return create_app(
        settings,
        lambda model: replica_of(traffic.pick(model, shares, models[model].application or model), model),
        says_id=says_id,
        background=lambda journal: traffic.follow(shares, journal.take_seen),
    )


def build_gateway(settings: GatewaySettings | dict[str, Any]) -> ray_serve.Application:
    """The gateway behind Ray Serve's proxy."""
    checked = GatewaySettings.model_validate(settings)

    def application() -> Any:  # Ray takes a function for a factory, and a partial for the application itself
        return gateway_of(checked, says_id=False)

    deployment = ray_serve.deployment(
        ray_serve.ingress(application)(),
        name="Gateway",
        max_ongoing_requests=_STREAMS_AT_ONCE,
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={"num_cpus": 0.25, "runtime_env": {"env_vars": ENVIRONMENT}},
    )
    return deployment.bind()


def applications(config: ServeConfig) -> dict[str, Any]:
    """The config file of Ray Serve for this config."""
    models = [
        {
            "name": application_of(group),
            "route_prefix": None,
            "import_path": "serve.app:build",
            "args": {"models": [entry.model_dump(mode="json") for entry in group]},
        }
        for group in grouped(config.models)
    ]
    gateway = {
        "name": GATEWAY,
        "route_prefix": "/",
        "import_path": "serve.app:build_gateway",
        "args": settings_of(config).model_dump(mode="json"),
    }
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        "applications": [*models, gateway],
    }


def settings_of(config: ServeConfig) -> GatewaySettings:
    shared = {entry.name: application_of(group) for group in grouped(config.models) for entry in group if entry.base}
    names = [*(entry.name for entry in config.models), *set(shared.values())]
    repeated = next((name for name in names if names.count(name) > 1 or name == GATEWAY), None)
    if repeated is not None:
        raise InputError(f"two models, or one and the gateway, are called '{repeated}': give one another 'name'")
    return GatewaySettings(
        models=[
            served(entry).model_copy(update={"application": shared.get(entry.name, "")}) for entry in config.models
        ],
        access=config.access,
        limits=config.limits,
        images=config.images,
        runs=str(Path(config.runs).absolute()),
        feedback=str(Path(config.feedback).absolute()),
    )


def deploy(models: Sequence[ModelEntry]) -> None:
    """Start those that are not running yet and wait until they are ready. Ray is there already."""
    ray_serve.start(proxy_location="Disabled")
    ray_serve.run_many([RunTarget(build(group), application_of(group), route_prefix=None) for group in grouped(models)])


class HandleReplica:
    """A deployment's replicas behind the gateway's `Replica`.

    What comes while each of an encoder's replicas has a batch goes there next as one call: beside the encoding of a
    short text, what a call to a replica costs is as much again.
    """

    def __init__(self, application: str, model: Served):
        self.application, self.model = application, model.name
        self.name = traffic.version(application, model.name)
        self.shared = bool(model.application)
        self.together: Together[Any, Any] | None = None
        if model.batches:
            self.together = Together(functools.partial(self._call, "many"), model.batches, model.queue)

    @functools.cached_property
    def handle(self) -> DeploymentHandle:
        """Raises RayServeException while there is no such application."""
        return ray_serve.get_app_handle(self.application)

    async def call(self, method: str, *arguments: Any) -> Any:
        if self.together is None or method == "ready":
            return await self._call(method, *arguments)
        if self.together.full:
            raise self._overloaded()
        return await self.together((method, arguments))

    async def _call(self, method: str, *arguments: Any) -> Any:
        for left in reversed(range(_TRIES)):
            try:
                return await self._once(method, arguments)
            except Refusal as refusal:
                raise _as_it_was(refusal) from None
            except (RayActorError, RayServeException) as error:
                if not left or isinstance(error, BackPressureError | DeploymentUnavailableError):
                    raise self._unavailable(error) from None
        raise AssertionError

    async def _once(self, method: str, arguments: Sequence[Any]) -> Any:
        response = self._sent(self.handle, "on", method, arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]:
        try:
            response = self._sent(self.handle.options(stream=True), "stream_on", method, arguments)
            try:
                async for item in response:
                    yield item
            finally:
                response.cancel()  # nobody reads on
        except Refusal as refusal:
            raise _as_it_was(refusal) from None
        except (RayActorError, RayServeException) as error:
            raise self._unavailable(error) from None

    def _sent(self, handle: DeploymentHandle, of_shared: str, method: str, arguments: Sequence[Any]) -> Any:
        if self.shared:
            return getattr(handle, of_shared).remote(self.model, method, *arguments)
        return getattr(handle, method).remote(*arguments)

    def _unavailable(self, error: Exception) -> Refusal:
        if isinstance(error, BackPressureError):
            return self._overloaded()
        return Refusal(503, f"model '{self.model}' is not there at the moment; come back later", retry_after=2)

    def _overloaded(self) -> Refusal:
        return Refusal(429, f"model '{self.model}' has all it can do; come back later", "overloaded", retry_after=1)


def _as_it_was(refusal: Refusal) -> Refusal:
    """Ray wraps what a replica raised, with its traceback."""
    cause = getattr(refusal, "cause", refusal)
    return cause if isinstance(cause, Refusal) else refusal
