"""The runs in a folder, for the console: what they reached, and their curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CURVES = ("reward", "pass_rate", "loss", "dev", "entropy", "kl")
_MOST_RUNS = 50
_MOST_POINTS = 400


def read(folder: Path) -> list[dict[str, Any]]:
    """The newest first. What is no whole run is left out: one that is being written comes the next time."""
    results = sorted(folder.glob("*/result.json"), key=lambda file: -file.stat().st_mtime)[:_MOST_RUNS]
    return [run for run in map(_run, results) if run]


def _run(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        metrics = pq.read_table(file.with_name("metrics.parquet"))
    except (OSError, ValueError, pa.ArrowException):
        return {}
    held_out = {
        label: [value["score"], value["low"], value["high"]]
        for label, value in result["held_out"].items()
        if label != "n"
    }
    found = {name: result[name] for name in ("model_type", "minutes")}
    return {"name": file.parent.name, **found, "held_out": held_out, "curves": _curves(metrics)}


def _curves(metrics: pa.Table) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By stage and metric: (update of the stage, value), at most so many points and always the last."""
    of: dict[str, dict[str, list[tuple[int, float]]]] = {}
    stages, steps = metrics["stage"].to_pylist(), metrics["step"].to_pylist()
    for name in CURVES:
        if name not in metrics.column_names:
            continue
        points: dict[str, list[tuple[int, float]]] = {}
        for stage, step, value in zip(stages, steps, metrics[name].to_pylist(), strict=True):
            if value is not None:
                points.setdefault(stage, []).append((step + 1, value))
        for stage, of_stage in points.items():
            thinning = -(-len(of_stage) // _MOST_POINTS)
            of.setdefault(stage, {})[name] = of_stage[::-thinning][::-1]
    return of
