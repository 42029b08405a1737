"""A run put together: data, model, Ray, actors, observers; the pipeline in the middle; everything closed at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import xxhash

from srl_rlvr import __version__, checkpoints, model_types, pipeline
from srl_rlvr import config as configs
from srl_rlvr.config import RunConfig, SftStage
from srl_rlvr.errors import InputError, Stopped
from srl_rlvr.examples import shown, sources
from srl_rlvr.policies import base_models
from srl_rlvr.registry.tracking import Tracker, make_tracker
from srl_rlvr.reporting import report, result
from srl_rlvr.reporting.memory import PeakMemory
from srl_rlvr.reporting.progress import Progress
from srl_rlvr.scheduling import plan
from srl_rlvr.stages import sft
from srl_rlvr.verifiers import find_verifier

# Ray Train wants a folder of its own; our checkpoints do not lie in it.
_RAY_TRAIN = ".ray_train"
# Keys that may differ when a run is resumed: they change where it runs, not what it computes.
_MAY_CHANGE = {"cluster", "tracking", "checkpoint_every", "verifier", "max_staleness"}
_MAY_CHANGE_IN = {"engine": {"call_deadline_s"}, "learner": {"start_deadline_s", "call_deadline_s", "max_restarts"}}


def model_cache() -> Path:
    """Where models from packages are unpacked to."""
    return Path(os.environ.get("SRL_RLVR_CACHE", Path.home() / ".cache" / "srl-rlvr")) / "models"


def train(config: RunConfig, out: Path, resume: bool, command: str) -> int:
    """Run `config` in the folder `out`; returns the exit code 0 or raises InputError, RunError. After Ctrl-C its user
    is told to go on with `command`."""
    began = time.monotonic()
    on_cluster = config.cluster.address or os.environ.get("RAY_ADDRESS")
    config, remark = plan(config, None if on_cluster else os.cpu_count() or 1)
    model_type = model_types.find(config.model_type)
    config.model.base = config.model.base or model_type.base
    state, history, folder = _starting_point(config, out, resume)
    train_examples, dev, held_out = sources.load_all(config.data, config.seed, config.model_type)
    model = base_models.resolve(config.model.base, model_cache())
    tokenizer = model_type.load_tokenizer(model, config.model.max_context)
    of_model = base_models.read_config(model)
    limit = (of_model | of_model.get("text_config", {})).get("max_position_embeddings", config.model.max_context)
    if model_type.policy == "text":  # an encoder cuts its texts to the context
        train_examples, dev, held_out = pipeline.fitting(train_examples, (dev, held_out), tokenizer, config, limit)
    _check_data(state, out, train_examples, dev, held_out)
    _check_steps(config, train_examples)
    _check_verifiers({name for table in (train_examples, dev, held_out) for name in table["verifier"].to_pylist()})
    _check_disk(config, model, out, with_best=dev.num_rows > 0)
    _begin_folder(out, config)
    stages = [(stage.label, _steps(stage, train_examples.num_rows)) for stage in config.stages]
    with Progress(stages) as progress, PeakMemory(state.peak_memory_gib) as memory:
        if resume and folder is None:
            progress.note(f"{out} holds no checkpoint: the run begins")
        progress.note(f"{config.name}: {train_examples.num_rows} problems to learn from, {held_out.num_rows} held out")
        if remark:
            progress.note(remark)
        tracker = make_tracker(config, out.resolve(), progress.note)
        if config.tracking.mlflow:
            progress.phase("opening MLflow")
        state.tracking_id = tracker.start(config, state.tracking_id or None)
        status = "FAILED"
        try:
            with _crew(config, model, out, progress) as crew, _finish_on_signal(progress) as should_stop:
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
    _print_summary(state, memory, _metric(config), out)
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
    # Parsed, so that keys which have come since have their defaults.
    try:
        tree = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"checkpoint {folder} is damaged: delete it to go on from the one before") from None
    begun = configs.parse(tree, str(folder / "config.json"))
    before, now = (each.model_dump(mode="json", exclude=_MAY_CHANGE_IN) for each in (begun, config))
    changed = [key for key in now if key not in _MAY_CHANGE and now[key] != before[key]]
    if changed:
        raise InputError(
            f"{out} was begun with another '{changed[0]}': resume with the same run file, or use another --out"
        )
    return *checkpoints.read(folder), folder


def _check_data(state: checkpoints.State, out: Path, *parts: Any) -> None:
    """Raises InputError where a run that is resumed would learn from, or be judged by, other problems than before."""
    found = xxhash.xxh3_128_hexdigest(json.dumps([part["id"].to_pylist() for part in parts]).encode())
    if state.data not in ("", found):
        raise InputError(f"{out} was begun with other problems, as its data has changed: use another --out")
    state.data = found


def _begin_folder(out: Path, config: RunConfig) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(configs.dump(config))
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; name another folder by --out") from None


def _check_steps(config: RunConfig, examples: Any) -> None:
    """Problems without steps are found before anything is started."""
    from srl_rlvr.stages import srl

    for stage in config.stages:
        if stage.kind != "rlvr":
            srl.with_steps(examples.slice(0, stage.examples))


def _check_verifiers(names: set[str]) -> None:
    """A user's own verifiers are imported by the workers only; that they are there at all is found before that."""
    for name in sorted(names):
        module, own, _ = name.partition(":")
        if not own:
            find_verifier(name)
            continue
        try:
            missing = importlib.util.find_spec(module) is None
        except (ImportError, ValueError, SyntaxError):  # of a package above it, or of a program itself
            missing = True
        if missing:
            raise InputError(
                f"verifier '{name}' of the data: there is no module {module}; put it into the working folder or on "
                "PYTHONPATH"
            )


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
def _crew(config: RunConfig, model: Path, out: Path, progress: Progress) -> Iterator[Any]:
    progress.phase("starting Ray")
    import ray

    from actors import supervisor

    supervisor.start_ray(config, progress.note)
    try:
        kind = model_types.find(config.model_type).engine or config.engine.kind
        progress.phase(f"starting the {kind} engine and the learner")
        run_id = f"{config.name}-{time.time_ns() % 10**9:09d}"
        crew = supervisor.Crew(config, model.resolve(), run_id, (out / _RAY_TRAIN).resolve())
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
    report.write_report(
        out / "report.html",
        config=config.model_dump(mode="json"),
        metrics=metrics,
        rollouts=run.history.rollout_table(),
        result=written,
        notes=[str(alarm) for alarm in run.watch.alarms],
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
    run.crew.save_model(partial.resolve(), card)  # type: ignore[attr-defined]
    run.tokenizer.save_pretrained(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def _print_summary(state: checkpoints.State, memory: PeakMemory, metric: str, out: Path) -> None:
    print()
    print(result.table(pipeline.held_out_intervals(state), state.counted, metric))
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in sorted(memory.parts_gib.items(), key=lambda x: -x[1])[:4])
    print(f"\n{state.seconds / 60:.1f} minutes, {state.sampled_tokens:,} tokens sampled, "
          f"peak memory {state.peak_memory_gib:.1f} GiB ({parts})")  # fmt: skip
    print(f"model   {out / 'model'}\nreport  {out / 'report.html'}")
