"""SERVE.toml: which models, where they listen, who may ask, and how much."""

from __future__ import annotations

import ipaddress
import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from srl_rlvr.config import explain
from srl_rlvr.errors import InputError

DRAIN_S = 30
"""What is being answered when serving ends, or a replica goes, has so long to end."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelEntry(Part):
    path: str
    """A model folder, a Hugging Face id, or `registry:NAME` for the champion of that name."""
    name: str = ""
    """What clients call it; the name in its card where it is left out."""
    base: str = ""
    """The model that its adapters are of: models of one base share it in one engine, which runs as the first of them
    says. Where it is left out, the model has its own weights and engine."""
    replicas: int | tuple[int, int] = 1
    """How many, or the fewest and the most: as many as the load asks for."""
    target_ongoing: float = Field(default=8, gt=0)
    """Requests under way on each replica, above which another is started."""
    cpus: float = Field(default=0.25, ge=0)
    """Reserved for each replica on its node. What it uses is `threads`."""
    gpus: float = Field(default=0, ge=0)
    threads: int = Field(default=0, ge=0)
    """Of each replica; 0: its part of the cores where Ray is started here, else one for each core."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    max_running: int = Field(default=16, ge=1)
    """Answers that are written at the same time."""
    kv_cache_gib: float = Field(default=0.5, gt=0)
    max_context: int | None = Field(default=None, ge=8)
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest context and answer; as the card says where they are left out."""
    queue: int = Field(default=256, ge=0)
    """Requests that wait for a replica, beyond which a client is told to come back (503)."""

    @field_validator("replicas")
    @classmethod
    def _in_order(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = (value, value) if isinstance(value, int) else value
        if not 1 <= low <= high:
            raise ValueError("replicas should be 1 or more, or the fewest and the most")
        return value


class Access(Part):
    keys: str = ""
    """The file that `srl-rlvr serve --new-key` writes. Without one, whoever reaches the port may ask."""
    open: bool = False
    """Listen on more than this machine without keys."""
    tls_certificate: str = ""
    tls_key: str = ""
    cors: list[str] = []
    """Pages of these origins may ask from a browser."""
    hosts: list[str] = []
    """Names, beside localhost, under which a gateway that listens on this machine only may be asked: a page elsewhere
    can have any name point here."""


class Limits(Part):
    body_mib: float = Field(default=20, gt=0)
    values: int = Field(default=200_000, ge=1000)
    """Values (numbers, texts, objects, arrays) in the JSON of one body: reading them stops everything else."""
    texts: int = Field(default=2048, ge=1)
    """Texts or documents of one request."""
    answers: int = Field(default=64, ge=1)
    """Prompts of a completion times `n`."""
    requests_per_minute: int = Field(default=0, ge=0)
    """Of each key, where the key has no limit of its own; 0: no limit. A request of several prompts, `n` above 1 or
    several sentences to parse counts as many."""
    deadline_s: float = Field(default=120, gt=0)
    receive_s: float = Field(default=60, gt=0)
    """In which a client has to send a request whole, head and body."""
    connections: int = Field(default=1000, ge=1)
    """Open at the same time; beyond them a request is answered with 503."""


class Images(Part):
    fetch: bool = False
    """Whether http(s) addresses are fetched. Never from private addresses."""
    most: int = Field(default=8, ge=1)
    """In one request."""
    mib: float = Field(default=10, gt=0)
    timeout_s: float = Field(default=10, gt=0)


class Upgrade(Part):
    """How a new version of a model comes in the place of the old one."""

    share: float = Field(default=0.1, gt=0, lt=1)
    """Of the requests that it answers at first."""
    requests: int = Field(default=200, ge=1)
    """That it answers before it is judged, or"""
    minutes: float = Field(default=10, gt=0)
    """as long as this."""
    errors: float = Field(default=0.01, ge=0)
    """It goes back where its share of failed requests is more than this above the old one's,"""
    slower: float = Field(default=1.5, ge=1)
    """its 95th percentile of time more than so many times the old one's,"""
    feedback: float = Field(default=0.1, ge=0)
    """or its mean reward more than this below the old one's."""
    registry_every_s: float = Field(default=30, gt=0)
    """How often the registry is asked whether a champion is another."""


class ServeConfig(Part):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    address: str = ""
    """A Ray cluster to join; without one, and without RAY_ADDRESS, Ray is started here."""
    start_deadline_s: float = Field(default=900, gt=0)
    """How long all models together, or a new version of one, may take to start."""
    models: list[ModelEntry] = []
    """Every champion in the registry where there are none."""
    access: Access = Access()
    limits: Limits = Limits()
    images: Images = Images()
    upgrade: Upgrade = Upgrade()
    runs: str = "out"
    """The folder whose runs the console shows."""
    feedback: str = "out/serve/feedback.jsonl"

    @model_validator(mode="after")
    def _guarded(self) -> ServeConfig:
        if not (self.access.keys or self.access.open or is_loopback(self.host)):
            raise ValueError(
                f"host {self.host} is more than this machine and access.keys names no file: make one with "
                "'srl-rlvr serve --new-key NAME', or set access.open = true"
            )
        if bool(self.access.tls_certificate) != bool(self.access.tls_key):
            raise ValueError("access.tls_certificate and access.tls_key belong together")
        return self

    @model_validator(mode="after")
    def _carried(self) -> ServeConfig:
        """The way from the gateway to a replica has to take the largest request."""
        name = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
        carried, largest = int(os.environ[name]), largest_message(self.limits, self.images)
        if largest > carried:
            raise ValueError(
                f"limits.body_mib = {self.limits.body_mib:g} and the images make requests of {largest:,} bytes, and "
                f"{carried:,} are carried to a replica: lower them, or set the environment variable {name} to "
                f"{largest} everywhere"
            )
        return self


class Served(BaseModel):
    """A model as the gateway knows it."""

    name: str
    model_type: str
    policy: str  # of its type: text | ranking
    created: int
    kind: str = ""
    """The known type whose endpoint answers for it; its own type if empty."""
    max_tokens: int = 0
    """Of an answer, if the request does not say; 0: not known."""
    example: dict[str, Any] = {}
    """An input of its own data, for the console."""
    batches: int = 0
    """Of requests, that its replicas work on at a time; 0: requests go there one by one. (Where replicas come and go,
    their number follows that of the requests.)"""
    queue: int = 256
    application: str = ""
    """That answers for it and others; its own where there is none."""


class GatewaySettings(BaseModel):
    """What the gateway is deployed with."""

    models: list[Served]
    access: Access = Access()
    limits: Limits = Limits()
    images: Images = Images()
    runs: str = "out"
    feedback: str = "out/serve/feedback.jsonl"
    hosts: list[str] = []
    """Whom a request may name as its host; anyone if there are none."""


def largest_message(limits: Limits, images: Images) -> int:
    """Bytes of a call to a replica: the body's texts, fetched images as base64, and what holds its values together."""
    fetched_mib = images.most * images.mib * 4 / 3 if images.fetch else 0
    return int((limits.body_mib + fetched_mib + 1) * 2**20) + 16 * limits.values


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hosts_of(config: ServeConfig) -> list[str]:
    """The names under which a gateway of this config may be asked; none for any."""
    return ["localhost", *config.access.hosts] if is_loopback(config.host) else []


def load(path: Path) -> ServeConfig:
    """Raises InputError naming the key that is wrong. Paths in the file are from its folder."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    config = check(raw, str(path))
    here = path.absolute().parent

    def placed(value: str) -> str:
        return str(here / value) if value and (here / value).exists() else value

    for entry in config.models:
        entry.path, entry.base = placed(entry.path), placed(entry.base)
    config.access = config.access.model_copy(
        update={name: placed(getattr(config.access, name)) for name in ("keys", "tls_certificate", "tls_key")}
    )
    return config


def check(raw: dict[str, Any], where: str) -> ServeConfig:
    """Raises InputError with the first fault; `where` names the file."""
    try:
        return ServeConfig.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, ServeConfig)}") from None
