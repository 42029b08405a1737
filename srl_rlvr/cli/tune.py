"""`srl-rlvr tune`: the best values of some keys of a run file, by Ray Tune with asynchronous successive halving
(ASHA; Li et al., 1810.05934). A trial is `srl-rlvr train` in a process of its own."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srl_rlvr import checkpoints, folder_lock, search_space
from srl_rlvr import config as configs
from srl_rlvr.cli import stay_on_this_machine
from srl_rlvr.config import RunConfig
from srl_rlvr.errors import InputError, RunError, Stopped
from srl_rlvr.registry.tracking import make_tracker
from srl_rlvr.search_space import SearchSpace

_POLL_S = 1.0
_STOP_DEADLINE_S = 60.0
_NAME, _TRIALS = "search", "trials"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "tune",
        help="find the best values of some keys of a run file",
        description="Try values of keys of RUN.toml as SPACE.toml says, stop the worse trials early (ASHA), and write\n"
        "the best as a run file. Trials are compared by their best pass rate on the dev problems (data.dev).",
        epilog="SPACE.toml:\n"
        "  trials = 16\n"
        "  [keys]\n"
        '  "stages.srl.learning_rate" = { log_uniform = [1e-5, 1e-3] }\n'
        '  "stages.srl.measure" = { choice = ["characters", "words"] }\n'
        '  "stages.srl.group_size" = { integer = [4, 16] }\n\n'
        "writes DIR/best.toml, DIR/trials.json, and every trial's run below DIR/trials",
    )
    parser.add_argument("run_file", metavar="RUN.toml", type=Path)
    parser.add_argument("space_file", metavar="SPACE.toml", type=Path)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the search (default: out/<name>-tune)")
    parser.add_argument("--resume", action="store_true", help="go on with the search in DIR")
    return parser


def run(options: argparse.Namespace) -> int:
    config = configs.load(options.run_file)
    space = search_space.load(options.space_file, options.run_file)
    out = (options.out or Path("out") / f"{config.name}-tune").resolve()
    with folder_lock.locked(out):
        return _tune(options, config, space, out)


def _tune(options: argparse.Namespace, config: RunConfig, space: SearchSpace, out: Path) -> int:
    _begin_folder(out, config, space, options.resume)
    # A run of its own in MLflow, beside those of its trials: the store is there before they come.
    tracker = make_tracker(config, out / _TRIALS / _NAME, print)
    tracker.start(config.model_copy(update={"name": f"{config.name}-tune"}))
    status = "FAILED"
    try:
        results = _search(config, space, options.run_file.resolve(), out)
        rows = sorted(results, key=lambda row: (-row["best"], row["overrides"]))
        (out / "trials.json").write_text(json.dumps(rows, indent=2) + "\n")
        _print_trials(rows)
        if not all(row["done"] or row["error"] for row in results):
            command = shlex.join(
                ["srl-rlvr", "tune", str(options.run_file), str(options.space_file), "--out", str(out)]
            )
            raise Stopped(f"stopped before all trials were done; go on with: {command} --resume")
        scored = [row for row in rows if not row["error"]]
        if not scored:
            raise RunError(f"no trial came to an end: {rows[0]['error']}; their output is below {out / _TRIALS}")
        _write_run_file(out / "best.toml", options.run_file, scored[0]["overrides"])
        tracker.log_artifacts([out / "trials.json", out / "best.toml"])
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        tracker.end(status)
    print(f"run     {out / 'best.toml'}")
    return 0


def _begin_folder(out: Path, config: RunConfig, space: SearchSpace, resume: bool) -> None:
    now = {"run": config.model_dump(mode="json"), "space": space.model_dump(mode="json")}
    file = out / "search.json"
    if file.is_file():
        if not resume:
            raise InputError(f"{out} holds a search already: go on with --resume, or name another folder by --out")
        changed = [name for name, value in json.loads(file.read_text()).items() if value != now[name]]
        if changed:
            raise InputError(
                f"{out} was begun with another {changed[0]} file: resume with the same, or use another --out"
            )
    try:
        (out / _TRIALS).mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(now, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; name another folder by --out") from None


def _search(config: RunConfig, space: SearchSpace, run_file: Path, out: Path) -> list[dict[str, Any]]:
    """All trials: their values, their best dev score, how far they came, and what went wrong."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    if not (config.cluster.address or os.environ.get("RAY_ADDRESS")):
        stay_on_this_machine()
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from actors import supervisor
    from srl_rlvr.scheduling import plan

    local = supervisor.start_ray(config, print, space.concurrent)
    overrides = [f"checkpoint_every={config.evaluation.every}", "evaluation.on_stages=false"]
    if local:  # a trial, which joins this Ray, takes it for a cluster
        overrides.append(f"max_staleness={plan(config, os.cpu_count() or 1)[0].max_staleness}")
    # Ray runs a trial in a folder of its own.
    parameters = {"run_file": str(run_file), "out": str(out / _TRIALS), "common": overrides, "cwd": os.getcwd()}
    trainable = tune.with_parameters(_trial_class(), **parameters)
    trainable = tune.with_resources(trainable, {"CPU": 0, "memory": 1})  # not nothing, but its run takes the CPUs
    try:
        if tune.Tuner.can_restore(str(out / _NAME)):
            tuner = tune.Tuner.restore(
                str(out / _NAME), trainable=trainable, resume_unfinished=True, restart_errored=True
            )
        else:
            scheduler = ASHAScheduler(
                time_attr="updates", max_t=10**9, grace_period=space.grace, reduction_factor=space.reduction
            )
            tuner = tune.Tuner(
                trainable,
                param_space={key: _domain(values) for key, values in space.keys.items()},
                tune_config=tune.TuneConfig(
                    metric="best",
                    mode="max",
                    scheduler=scheduler,
                    search_alg=BasicVariantGenerator(max_concurrent=space.concurrent, random_state=config.seed),
                    num_samples=space.trials,
                ),
                run_config=tune.RunConfig(name=_NAME, storage_path=str(out), verbose=0, callbacks=[_announcer()]),
            )
        found = tuner.fit()
    finally:
        ray.shutdown()
    return [
        {
            "overrides": [search_space.override(key, value) for key, value in (result.config or {}).items()],
            "best": float((result.metrics or {}).get("best", 0.0)),
            "updates": int((result.metrics or {}).get("updates", 0)),
            "done": bool((result.metrics or {}).get("done")),
            "error": str(result.error).strip().splitlines()[-1] if result.error else "",
        }
        for result in found
    ]


def _trial_class() -> type:
    """Made here because its base class is Ray's, and that is imported late."""
    from ray import get_runtime_context
    from ray.tune import Trainable

    class Trial(Trainable):
        """`srl-rlvr train` with some keys set; each of its looks at the dev problems is one result."""

        def setup(
            self, config: dict[str, Any], run_file: str = "", out: str = "", common: Sequence[str] = (), cwd: str = ""
        ) -> None:
            self._folder = Path(out) / self.trial_id
            self._folder.mkdir(parents=True, exist_ok=True)
            overrides = [*common, *(search_space.override(key, value) for key, value in config.items())]
            overrides.append(f'name="{self.trial_id}"')
            command = [sys.executable, "-m", "srl_rlvr", "train", run_file, "--out", str(self._folder), "--resume"]
            command += [word for each in overrides for word in ("--set", each)]
            environment = os.environ | {"RAY_ADDRESS": get_runtime_context().gcs_address}
            self._log = (self._folder / "output.log").open("a")
            self._process = subprocess.Popen(
                command, stdout=self._log, stderr=subprocess.STDOUT, env=environment, cwd=cwd
            )
            self._seen = 0

        def step(self) -> dict[str, Any]:
            while True:
                ended = self._process.poll() is not None  # before the look: what came between is seen
                looks = _looks(self._folder)
                if len(looks) > self._seen or ended:
                    break
                time.sleep(_POLL_S)
            if self._process.returncode:
                text = (self._folder / "output.log").read_text().strip().splitlines()
                raise RuntimeError(text[-1] if text else f"the run ended with code {self._process.returncode}")
            self._seen = len(looks)
            updates, best = looks[-1]
            return {"best": best, "updates": updates, "done": ended}

        def cleanup(self) -> None:
            self._process.terminate()  # it finishes its step and saves
            try:
                self._process.wait(_STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._log.close()

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """The run keeps its own."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """The run goes on by itself."""

    return Trial


def _looks(folder: Path) -> list[tuple[int, float]]:
    """(updates made, best dev score so far) after each look of the run in `folder` that is saved."""
    newest = checkpoints.latest(folder)
    if newest is None:
        return []
    try:
        scores = checkpoints.read_state(newest).dev_scores
    except InputError:
        if newest.is_dir():
            raise
        return []  # the run has deleted it, as there is a newer one: see the next look
    best = itertools.accumulate((score for _, score in scores), max)
    return [(int(number), score) for (number, _), score in zip(scores, best, strict=True)]


def _domain(values: search_space.Values) -> Any:
    from ray import tune

    if values.choice is not None:
        return tune.choice(values.choice)
    if values.uniform is not None:
        return tune.uniform(*values.uniform)
    if values.log_uniform is not None:
        return tune.loguniform(*values.log_uniform)
    assert values.integer is not None
    return tune.randint(values.integer[0], values.integer[1] + 1)


def _announcer() -> Any:
    from ray.tune import Callback

    class Announcer(Callback):
        """A line for each result."""

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            print(f"trial {trial.trial_id}: {result['best']:.1%} of dev after {result['updates']} updates", flush=True)

    return Announcer()


def _print_trials(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        score = row["error"] or f"{row['best']:6.1%}  {row['updates']:>5} updates"
        print(f"{score}  {'  '.join(row['overrides'])}")


def _write_run_file(path: Path, run_file: Path, overrides: list[str]) -> None:
    """What RUN.toml and the values say, no more: defaults stay defaults."""
    import tomli_w

    tree = configs.load(run_file, overrides).model_dump(mode="json", exclude_unset=True, exclude_none=True)
    path.write_text(tomli_w.dumps(tree))
