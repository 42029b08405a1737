"""The runs in a folder, for the console: what they reached, their curves, and their reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CURVES = ("reward", "pass_rate", "loss", "dev", "entropy", "kl")
_MOST_RUNS = 50
_MOST_POINTS = 400


def read(folder: Path) -> list[dict[str, Any]]:
    """The newest first. What is no whole run is left out: one that is being written comes the next time."""
    results = sorted(folder.glob("*/result.json"), key=_written, reverse=True)[:_MOST_RUNS]
    return [run for run in map(_run, results) if run]


def report(folder: Path, name: str) -> Path | None:
    """The report of the run of that name: a file right below its folder, which is right below `folder`, and not
    elsewhere by a link. The name is compared with those that are there, and never put into a path."""
    results = (file.parent for file in folder.glob("*/result.json"))
    run = next((found for found in results if found.name == name), None)
    if run is None:
        return None
    try:
        file = (run / "report.html").resolve(strict=True)
    except (OSError, RuntimeError):  # none, or links that go round
        return None
    inside = file.is_file() and file == folder.resolve() / run.name / "report.html"
    return file if inside else None


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _run(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        metrics = pq.read_table(file.with_name("metrics.parquet"))
        found = {"model_type": str(result["model_type"]), "minutes": float(result["minutes"])}
        held_out = {
            str(label): [float(value[key]) for key in ("score", "low", "high")]
            for label, value in result["held_out"].items()
            if label != "n"
        }
        curves = _curves(metrics)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):  # not as a run writes it
        return {}
    held_out = {label: values for label, values in held_out.items() if all(map(math.isfinite, values))}
    name = file.parent.name
    has_report = report(file.parent.parent, name) is not None
    return {"name": name, **found, "held_out": held_out, "curves": curves, "report": has_report}


def _curves(metrics: pa.Table) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By stage and metric: (update of the stage, value), at most so many points and always the last. JSON has no place
    for values that are not finite."""
    of: dict[str, dict[str, list[tuple[int, float]]]] = {}
    stages, steps = metrics["stage"].to_pylist(), metrics["step"].to_pylist()
    for name in CURVES:
        if name not in metrics.column_names:
            continue
        points: dict[str, list[tuple[int, float]]] = {}
        for stage, step, value in zip(stages, steps, metrics[name].to_pylist(), strict=True):
            if value is not None and math.isfinite(value):
                points.setdefault(stage, []).append((step + 1, value))
        for stage, of_stage in points.items():
            thinning = -(-len(of_stage) // _MOST_POINTS)
            of.setdefault(stage, {})[name] = of_stage[::-thinning][::-1]
    return of
