"""A run put together: data, model, Ray, actors, observers; the pipeline in the middle; everything closed at the end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from srl_rlvr import __version__, checkpoints, folder_lock, model_types, pipeline, resuming
from srl_rlvr import config as configs
from srl_rlvr.cli import stay_on_this_machine
from srl_rlvr.config import RunConfig, SftStage
from srl_rlvr.errors import InputError, Stopped
from srl_rlvr.examples import shown, sources
from srl_rlvr.policies import base_models
from srl_rlvr.policies.base_models import model_cache
from srl_rlvr.registry.tracking import Tracker, make_tracker
from srl_rlvr.reporting import report, result
from srl_rlvr.reporting.memory import PeakMemory
from srl_rlvr.reporting.progress import Progress
from srl_rlvr.scheduling import plan
from srl_rlvr.stages import sft
from srl_rlvr.verifiers import check_name

# Ray Train wants a folder of its own; our checkpoints do not lie in it.
_RAY_TRAIN = ".ray_train"
# Digests of the problems that a run was begun with, beside its checkpoints: they tell which one has changed.
_PROBLEMS = "problems.parquet"
# The report shows rollouts of some steps if it would be larger than this.
_REPORT_ROWS, _REPORT_TOKENS = 20_000, 1_000_000


def train(config: RunConfig, out: Path, resume: bool, command: str) -> int:
    """Run `config` in the folder `out`; returns the exit code 0 or raises InputError, RunError. After Ctrl-C its user
    is told to go on with `command`."""
    with folder_lock.locked(out):
        with _writing_to(out):
            checkpoints.recover(out)
        return _train(config, out, resume, command)


def _train(config: RunConfig, out: Path, resume: bool, command: str) -> int:
    began = time.monotonic()
    on_cluster = config.cluster.address or os.environ.get("RAY_ADDRESS")
    config, remark = plan(config, None if on_cluster else os.cpu_count() or 1)
    model_type = model_types.find(config.model_type)
    config.model.base = config.model.base or model_type.base
    state, history, folder = _starting_point(config, out, resume)
    train_examples, dev, held_out = sources.load_all(config.data, config.seed, config.model_type, config.verifiers)
    model = base_models.resolve(config.model.base, model_cache())
    tokenizer = model_type.load_tokenizer(model, config.model.max_context)
    of_model = base_models.read_config(model)
    limit = (of_model | of_model.get("text_config", {})).get("max_position_embeddings", config.model.max_context)
    if model_type.policy == "text":  # an encoder cuts its texts to the context
        train_examples, dev, held_out = pipeline.fitting(train_examples, (dev, held_out), tokenizer, config, limit)
    _check_base(state, out, model)
    _check_data(state, out, train_examples, dev, held_out)
    _check_steps(config, train_examples)
    named = {name for table in (train_examples, dev, held_out) for name in table["verifier"].to_pylist()}
    _check_verifiers(named, config.verifiers)
    _check_disk(config, model, out, with_best=dev.num_rows > 0)
    _begin_folder(out, config)
    stages = [(stage.label, _steps(stage, train_examples.num_rows)) for stage in config.stages]
    with Progress(stages) as progress, PeakMemory(state.peak_memory_gib) as memory:
        if resume and folder is None:
            progress.note(f"{out} holds no checkpoint: the run begins")
        progress.note(f"{config.name}: {train_examples.num_rows} problems to learn from, {held_out.num_rows} held out")
        if remark:
            progress.note(remark)
        for change in _changes(config, folder) if folder else []:
            progress.note(
                f"WARNING: {change} has changed: the run will not end bit for bit as without the interruption"
            )
        tracker = make_tracker(config, out.resolve(), progress.note)
        if config.tracking.mlflow:
            progress.phase("opening MLflow")
        state.tracking_id = tracker.start(config, state.tracking_id or None)
        status = "FAILED"
        try:
            with _crew(config, out, progress) as crew, _finish_on_signal(progress) as should_stop:
                observer = _Observer(progress, tracker, config.name, memory, state)
                run = pipeline.Run(
                    config, train_examples, held_out, tokenizer, crew, out, observer, state, history,
                    dev if dev.num_rows else None, should_stop, began,
                )  # fmt: skip
                if folder is not None:
                    progress.phase(f"going on from {folder.name}")
                    crew.load(folder)
                    crew.hand_over()
                run.execute()
                state.peak_memory_gib = memory.gib
                _write_results(run, model, tracker)
            status = "FINISHED"
        except Stopped as stopped:
            status = "KILLED"
            raise Stopped(f"{stopped}; go on with: {command}") from None
        finally:
            tracker.end(status)
    _print_summary(state, memory, _metric(config), out, run.without_update())
    return 0


def _starting_point(
    config: RunConfig, out: Path, resume: bool
) -> tuple[checkpoints.State, checkpoints.History, Path | None]:
    folder = checkpoints.latest(out)
    if folder is None:
        return checkpoints.State(), checkpoints.History(), None
    if not resume:
        raise InputError(
            f"{out} holds a run already ({folder.name}): go on with --resume, or name another folder by --out"
        )
    refused = [change for change in _changes(config, folder) if not change.is_allowed]
    if refused:
        raise InputError(f"{out} was begun with another {refused[0]}: resume with the same value, or use another --out")
    return *checkpoints.read(folder), folder


def _changes(config: RunConfig, folder: Path) -> list[resuming.Change]:
    """The settings that are not those of the checkpoint."""
    # Parsed, so that keys which have come since have their defaults.
    try:
        tree = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"checkpoint {folder} is damaged: delete it to go on from the one before") from None
    return resuming.changes(configs.parse(tree, str(folder / "config.json")), config)


def _check_base(state: checkpoints.State, out: Path, model: Path) -> None:
    """Raises InputError if a run that is resumed would go on with another base model, wherever it lies."""
    found = resuming.model_digest(model)
    if state.base not in ("", found):
        raise InputError(
            f"{out} was begun with another base model than the one in {model}: resume with the same, or use another "
            "--out"
        )
    state.base = found


def _check_data(state: checkpoints.State, out: Path, *parts: Any) -> None:
    """Raises InputError if a run that is resumed would learn from, or be judged by, other problems than before; `parts`
    are train, dev and held-out."""
    found = resuming.fingerprints(*parts)
    digest = resuming.data_digest(found, parts[0])
    if state.data in ("", digest):
        state.data = digest
        with _writing_to(out):
            resuming.write_fingerprints(out / _PROBLEMS, found)
        return
    before = resuming.read_fingerprints(out / _PROBLEMS)
    first = f": {resuming.first_change(before, found, *parts)}" if before is not None else ""
    raise InputError(
        f"{out} was begun with other problems, as its data has changed{first}; resume with the same data, or use "
        "another --out"
    )


def _begin_folder(out: Path, config: RunConfig) -> None:
    with _writing_to(out):
        (out / "config.json").write_text(configs.dump(config))


@contextlib.contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; name another folder by --out") from None


def _check_steps(config: RunConfig, examples: Any) -> None:
    """Problems without steps are found before anything is started."""
    from srl_rlvr.stages import srl

    for stage in config.stages:
        if stage.kind != "rlvr":
            srl.with_steps(examples.slice(0, stage.examples))


def _check_verifiers(names: set[str], own: Sequence[str] = ()) -> None:
    """Raise InputError if a name is not known or not declared, or the module of a declared one is not there.

    Only the workers import a user's own verifiers, so their modules are looked up without importing anything.
    """
    for name in sorted({*names, *own}):
        check_name(name, own)
        module, of_user, _ = name.partition(":")
        if of_user and not _is_module(module):
            raise InputError(
                f"verifier '{name}': there is no module {module}; put it into the working folder or on PYTHONPATH"
            )


def _is_module(name: str) -> bool:
    """Whether the import system finds the module. Unlike find_spec, this does not import the packages above it."""
    places: list[str] | None = None  # sys.path
    for part in itertools.accumulate(name.split("."), "{}.{}".format):
        try:
            found = (finder.find_spec(part, places) for finder in sys.meta_path)
            spec = next(filter(None, found), None)
        except (ImportError, ValueError):
            return False
        if spec is None:
            return False
        places = list(spec.submodule_search_locations or [])
    return True


def _check_disk(config: RunConfig, model: Path, out: Path, with_best: bool) -> None:
    """The model and, unless adapters are all that learns, three checkpoints (one is half written) and the best must
    find room: four bytes for each weight, its two moments and its reference."""
    bytes_, of_each = 4 * base_models.count_weights(model), 0
    if not config.model.lora_rank:
        with_reference = any(stage.kind == "dpo" or getattr(stage, "kl", 0) for stage in config.stages)
        of_each = 4 if with_reference else 3
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    needed, free = bytes_ * (1 + of_each * (4 if with_best else 3)), shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"{place} has {free / 2**30:.1f} GiB free; checkpoints and the model need {needed / 2**30:.1f} GiB: free "
            "some, or name another folder by --out"
        )


def _steps(stage: Any, examples: int) -> int:
    return sft.steps(stage, examples) if isinstance(stage, SftStage) else stage.steps


@contextlib.contextmanager
def _crew(config: RunConfig, out: Path, progress: Progress) -> Iterator[Any]:
    progress.phase("starting Ray")
    if not (config.cluster.address or os.environ.get("RAY_ADDRESS")):
        stay_on_this_machine()
    import ray

    from actors import supervisor
    from actors.cluster import ascii_name

    supervisor.start_ray(config, progress.note)
    try:
        progress.phase(f"starting the {config.engine_kind} engine and the learner")
        run_id = f"{ascii_name(config.name)}-{time.time_ns() % 10**9:09d}"
        model = base_models.for_all_nodes(config.model.base)
        crew = supervisor.Crew(config, model, run_id, (out / _RAY_TRAIN).resolve())
        try:
            for notice in crew.wait_until_ready():
                progress.note(notice)
            yield crew
        finally:
            crew.close()
    finally:
        ray.shutdown()
        shutil.rmtree(out / _RAY_TRAIN, ignore_errors=True)


@contextlib.contextmanager
def _finish_on_signal(progress: Progress) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) asks the run to finish its step and save; the second ends it at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        progress.note("stopping: finishing this step and saving it (once more ends at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Observer:
    """Passes what happens on to the display, the tracker and Ray's metrics."""

    def __init__(self, progress: Progress, tracker: Tracker, run: str, memory: PeakMemory, state: checkpoints.State):
        from actors.telemetry import Telemetry

        self._progress, self._tracker, self._telemetry = progress, tracker, Telemetry(run)
        self._memory, self._state = memory, state
        self.stage, self.phase, self.note = progress.stage, progress.phase, progress.note

    def step(self, metrics: dict[str, Any]) -> None:
        self._state.peak_memory_gib = self._memory.gib
        self._progress.step(metrics["step"], {k: v for k, v in metrics.items() if isinstance(v, float | int)})
        self._telemetry.step(metrics)
        numbers = {f"{metrics['stage']}/{k}": v for k, v in metrics.items() if isinstance(v, float)}
        self._tracker.log_metrics(numbers, metrics["update"])


def _write_results(run: pipeline.Run, base: Path, tracker: Tracker) -> None:
    config, state, out = run.config, run.state, run.out
    held_out = pipeline.held_out_intervals(state)
    written = result.write_result(
        out / "result.json", config.model_type, held_out, state.counted,
        round(state.seconds / 60, 2), round(state.peak_memory_gib, 2), state.sampled_tokens,
    )  # fmt: skip
    metrics = run.history.metrics_table()
    pq.write_table(metrics, out / "metrics.parquet")
    run.observer.phase("writing model and report")
    card = {
        "name": config.name,
        "model_type": config.model_type,
        "base": config.model.base,
        "think": config.think,
        "max_context": config.model.max_context,
        "max_tokens": config.evaluation.max_tokens,
        "stages": [stage.label for stage in config.stages],
        "data": [source.family or Path(source.path).name for source in config.data],
        "held_out": written["held_out"],
        "srl_rlvr": __version__,
    } | _type_card(run)
    if any(source.ordered for source in config.data):
        card["ordered"] = True
    if example := shown.example_input(run.held_out):
        card["example"] = example
    _save_model(run, base, card)
    sampled = run.rollouts.sample(_REPORT_ROWS, _REPORT_TOKENS)
    notes = [str(alarm) for alarm in run.watch.alarms] + run.without_update()
    if sampled.steps < sampled.all_steps:
        notes.append(
            f"rollouts of {sampled.steps} of {sampled.all_steps} steps are shown; all are in {out / 'rollouts'}"
        )
    report.write_report(
        out / "report.html",
        config=config.model_dump(mode="json"),
        metrics=metrics,
        rollouts=sampled.rows,
        result=written,
        notes=notes,
        metric=_metric(config),
    )
    for label, value in held_out.items():
        tracker.log_metrics({f"held_out/{label}": value.score}, 0)
    tracker.log_artifacts([out / name for name in ("config.json", "result.json", "report.html", "metrics.parquet")])
    tracker.log_model(out / "model", card)


def _type_card(run: pipeline.Run) -> dict[str, Any]:
    """What the model type adds to the card."""
    paths = [Path(source.path) for source in run.config.data if source.path]
    predictions: list[dict[str, Any]] = []
    if run.dev is not None and run.model_type.calibrates:
        config = run.config
        _, predictions = pipeline.evaluate(run.dev, run.tokenizer, run.crew, config.think, config.evaluation.max_tokens)
    return run.model_type.card(paths, pipeline.judged(predictions))


def _metric(config: RunConfig) -> str:
    """As people are told it."""
    metric = model_types.find(config.model_type).metric
    return "pass rate" if metric == "accuracy" else metric


def _save_model(run: pipeline.Run, base: Path, card: dict[str, Any]) -> None:
    """Written under a hidden name and renamed: a folder called `model` is whole."""
    final, partial = run.out / "model", run.out / ".model"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    run.crew.save_model(partial.resolve(), card)
    run.tokenizer.save_pretrained(partial)
    checkpoints.replace(final, partial)


def _print_summary(
    state: checkpoints.State, memory: PeakMemory, metric: str, out: Path, without_update: list[str]
) -> None:
    print()
    for line in without_update:
        print(f"WARNING: {line}")
    print(result.table(pipeline.held_out_intervals(state), state.counted, metric))
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in sorted(memory.parts_gib.items(), key=lambda x: -x[1])[:4])
    print(f"\n{state.seconds / 60:.1f} minutes, {state.sampled_tokens:,} tokens sampled, "
          f"peak memory {state.peak_memory_gib:.1f} GiB ({parts})")  # fmt: skip
    print(f"model   {out / 'model'}\nreport  {out / 'report.html'}")
