"""Deploys: one Ray Serve application for each model, and the gateway before them.

`srl-rlvr serve` listens itself (`gateway_of`): Ray Serve's proxy would double the time that is added to a request. On a
cluster the gateway is an application as well, behind the proxy: `applications` is that whole deployment as the config
file of Ray Serve, which `serve deploy` and KubeRay's RayService take.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from grpc.aio import AioRpcError
from ray import serve as ray_serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from actors.cluster import ascii_name, worker_environment
from serve import ENVIRONMENT, kinds, starting, traffic
from serve.config import DRAIN_S, GatewaySettings, ModelEntry, ServeConfig, Served, hosts_of
from serve.errors import Refusal
from serve.together import Together
from srl_rlvr import trained
from srl_rlvr.errors import InputError
from srl_rlvr.examples import shown

GATEWAY = "gateway"
_TRIES = 2  # of a call whose replica died under it: an answer has no effect but itself
_STREAMS_AT_ONCE = 1000
_LONG_BYTES = 256 * 2**10  # a longer call goes to a replica alone: others are not to wait for it
_TEXT_BYTES = 4096  # of what an encoder answers to a text


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
    """Its name, which Ray wants in ASCII."""
    return ascii_name(f"shared-{group[0].name}" if group[0].base else group[0].name)


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
        health_check_period_s=2,  # so soon Ray Serve notices that a replica's process has ended
        ray_actor_options={
            "num_cpus": entry.cpus,
            "num_gpus": entry.gpus,
            "runtime_env": _environment(entry),
        },
        **how,
    )
    return deployment.bind(entries if entry.base else entry)


def _environment(entry: ModelEntry) -> dict[str, Any]:
    """Of a replica, which may run on a cluster that was started without it."""
    found = worker_environment(entry.gpus, entry.threads or os.cpu_count() or 1)
    return found | {"env_vars": {name: os.environ[name] for name in ENVIRONMENT} | found["env_vars"]}


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
        lambda model: replica_of(traffic.pick(model, shares, models[model].application or ascii_name(model)), model),
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
    applications = [ascii_name(name) for name in names]
    repeated = next(
        (name for name, of in zip(names, applications, strict=True) if applications.count(of) > 1 or of == GATEWAY),
        None,
    )
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
        hosts=hosts_of(config),
    )


def deploy(models: Sequence[ModelEntry], deadline_s: float, say: Callable[[str], None]) -> None:
    """Start those that are not running yet and wait until they are ready. Ray is there already.

    Raises NotStartedError naming the model that does not start.
    """
    ray_serve.start(proxy_location="Disabled")
    groups = {application_of(group): group for group in grouped(models)}
    starting.run(
        {name: (build(group), [entry.name for entry in group]) for name, group in groups.items()}, deadline_s, say
    )


class HandleReplica:
    """A deployment's replicas behind the gateway's `Replica`.

    What comes while each of an encoder's replicas has a batch goes there next as one call: beside the encoding of a
    short text, what a call to a replica costs is as much again.
    """

    def __init__(self, application: str, model: Served):
        self.application, self.model = application, model.name
        self.name = traffic.version(application, model.name)
        self.together: Together[Any, Any] | None = None
        if model.batches:
            self.together = Together(functools.partial(self._call, "many"), model.batches, model.queue)

    @functools.cached_property
    def handle(self) -> DeploymentHandle:
        """Raises RayServeException while there is no such application."""
        return ray_serve.get_app_handle(self.application)

    async def call(self, method: str, *arguments: Any) -> Any:
        if self.together is None or method == "ready" or _bytes(arguments) > _LONG_BYTES:
            return await self._call(method, *arguments)
        if self.together.full:
            raise self._overloaded()
        return await self.together((method, arguments))

    async def _call(self, method: str, *arguments: Any) -> Any:
        for left in reversed(range(1 if method == "ready" else _TRIES)):
            try:
                found = await self._once(method, arguments)
            except Exception as error:
                if not _failed_on_its_way(error):
                    raise
                if not left or _is_final(error):
                    raise self._unavailable(error) from None
                continue
            if isinstance(found, Refusal):
                raise found
            return found
        raise AssertionError

    async def _once(self, method: str, arguments: Sequence[Any]) -> Any:
        response = self.handle.on.remote(self.model, method, *arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]:
        """A stream whose replica dies before the first item is asked for once more."""
        begun = False
        for left in reversed(range(_TRIES)):
            try:
                handle: Any = self.handle.options(stream=True)
                response = handle.stream_on.remote(self.model, method, *arguments)
                try:
                    async for item in response:
                        if isinstance(item, Refusal):
                            raise item
                        begun = True
                        yield item
                finally:
                    response.cancel()  # nobody reads on
                return
            except Exception as error:
                if not _failed_on_its_way(error):
                    raise
                if begun:
                    said = f"model '{self.model}' ended before the answer was complete; send the request again"
                    raise Refusal(503, said, retry_after=2) from None
                if not left or _is_final(error):
                    raise self._unavailable(error) from None

    def _unavailable(self, error: Exception) -> Refusal:
        if isinstance(error, BackPressureError):
            return self._overloaded()
        if _is_too_large(error):
            return Refusal(413, f"the request is larger than what can be sent to model '{self.model}'")
        return Refusal(503, f"model '{self.model}' is not there at the moment; come back later", retry_after=2)

    def _overloaded(self) -> Refusal:
        return Refusal(503, f"model '{self.model}' has all it can do; come back later", "overloaded", retry_after=1)


def _failed_on_its_way(error: Exception) -> bool:
    """Whether it was not the replica's code that failed."""
    if isinstance(error, RayTaskError):  # what that raised
        return False
    if isinstance(error, RayError | RayServeException | AioRpcError):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith("Unexpected error (StatusCode.")  # Ray Serve's


def _is_final(error: Exception) -> bool:
    """Whether another try would end alike."""
    return isinstance(error, BackPressureError | DeploymentUnavailableError) or _is_too_large(error)


def _is_too_large(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) and "larger than max" in str(error)


def _bytes(arguments: Sequence[Any]) -> int:
    """About how many go to the replica for a call with these arguments, and come back."""
    waiting, found = list(arguments), 0
    while waiting:
        match waiting.pop():
            case str() as text:
                found += _TEXT_BYTES + len(text) * (1 if text.isascii() else 4)
            case list() | tuple() as items:
                waiting += items
            case dict() as named:
                waiting += [*named.keys(), *named.values()]
    return found
