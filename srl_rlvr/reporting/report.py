"""`report.html`: one self-contained page on a run, with its curves and its rollouts token by token.

It is handed tables; it must not know how they came about. Rollouts are untrusted text: they travel as JSON with
every `<` escaped, and the page inserts them as text only.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jinja2
import pyarrow as pa
from markupsafe import Markup

from srl_rlvr.records import RecordError
from srl_rlvr.reporting.result import write_atomically

ROLLOUT_VIEW = pa.schema(
    [
        ("stage", pa.string()),
        ("step", pa.int64()),  # 0-based in the stage
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("prompt", pa.string()),  # decoded
        ("reference", pa.string()),  # the expert's step or the right answer
        ("tokens", pa.list_(pa.string())),  # decoded piece by piece
        ("logprobs", pa.list_(pa.float32())),
        ("advantage", pa.float32()),
        ("reward", pa.float32()),
        ("outcome", pa.string()),
        ("components", pa.string()),  # JSON object
        ("detail", pa.string()),
        ("finish_reason", pa.string()),
    ]
)

_TEMPLATES = Path(__file__).parent / "templates"
_LOGPROB_SCALE = 1000  # log-probabilities travel as integers, in thousandths


@dataclass(frozen=True)
class Chart:
    """One small plot: the metric columns it draws and how to read them."""

    title: str
    hint: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()
    unit: Literal["number", "percent", "seconds", "count"] = "number"
    kind: Literal["line", "stack"] = "line"
    spread: str = ""
    """Column with the standard deviation, drawn as a band."""


CHARTS = (
    Chart("Reward", "mean of the samples, ± one deviation", ("reward",), spread="reward_std"),
    Chart("Pass rate", "samples that solve their prompt", ("pass_rate",), unit="percent"),
    Chart("Dev", "greedy answers to the dev problems, by which weights are kept", ("dev",), unit="percent"),
    Chart("Cross-entropy", "of the experts' solutions, while warming up", ("cross_entropy",)),
    Chart("Preference loss", "DPO: of the expert's solution over a wrong answer", ("preference_loss",)),
    Chart("Preferred", "DPO: pairs whose better answer the policy prefers", ("preferred",), unit="percent"),
    Chart("Groups with signal", "of those drawn; the others earn one reward alike",
          ("groups_with_signal", "groups_drawn"), ("with signal", "drawn"), unit="count"),
    Chart("Engine–learner divergence", "KL of the sampled tokens; flat and near 0 is healthy", ("divergence",)),
    Chart("KL to the reference", "how far the policy has moved in this stage", ("kl",)),
    Chart("Entropy", "a fall to 0 means that exploration has ended", ("entropy",)),
    Chart("Completion length", "mean, in tokens", ("completion_tokens",), unit="count"),
    Chart("Cut off", "completions that reached max_tokens", ("truncated",), unit="percent"),
    Chart("Policy loss", "moves around 0 by construction; only jumps tell", ("policy_loss",)),
    Chart("Gradient norm", "before clipping", ("grad_norm",)),
    Chart("Outcomes", "failed: our machinery, not the policy",
          ("scored", "invalid", "failed"), ("scored", "invalid", "failed"), unit="count", kind="stack"),
    Chart("Time per step", "by part",
          ("sample_s", "verify_s", "update_s", "handover_s"), ("sampling", "verifying", "updating", "hand-over"),
          unit="seconds", kind="stack"),
    Chart("Sampling speed", "tokens per second", ("tokens_per_s",), unit="count"),
    Chart("Learning rate", "of AdamW", ("learning_rate",)),
    Chart("Staleness", "versions between sampling and learning", ("staleness",), unit="count"),
)  # fmt: skip


def write_report(
    path: Path,
    *,
    config: Mapping[str, Any],
    metrics: pa.Table,
    rollouts: pa.Table,
    result: Mapping[str, Any],
    notes: Sequence[str] = (),
    metric: str = "pass rate",
) -> None:
    """Write the page on one run to `path`.

    config: the resolved config. metrics: one row an update with `stage`, `step` (0-based in the stage), `update`,
    `seconds` since the start and any metric columns; unknown ones are ignored. rollouts: ROLLOUT_VIEW.
    result: what `write_result` returned, and `metric` what it is of.
    Raises RecordError: tokens and logprobs of a sample differ in number.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        config=config,
        config_text=json.dumps(config, indent=2, default=str, ensure_ascii=False),
        data=_inert(_data(metrics, rollouts, config)),
        date=datetime.now().astimezone(),
        held_out=_held_out(result["held_out"]),
        n=result["held_out"]["n"],
        metric=metric,
        notes=notes,
        outcomes=_outcomes(metrics),
        result=result,
        script=Markup((_TEMPLATES / "report.js").read_text(encoding="utf-8")),
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        updates=metrics.num_rows,
    )
    write_atomically(path, page)


def _held_out(held_out: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows in percent, each with its gain over the row before in points."""
    rows: list[dict[str, Any]] = []
    for label, value in held_out.items():
        if label != "n":
            row = {"label": label, **{key: 100 * value[key] for key in ("score", "low", "high")}}
            row["gain"] = row["score"] - rows[-1]["score"] if rows else None
            rows.append(row)
    return rows


def _outcomes(metrics: pa.Table) -> dict[str, int]:
    """Verdicts of the whole run by outcome; empty where no stage verified anything."""
    counts = {name: _numbers(metrics, name) for name in ("scored", "invalid", "failed") if name in metrics.column_names}
    return {name: round(sum(value or 0 for value in values)) for name, values in counts.items()}


def _data(metrics: pa.Table, rollouts: pa.Table, config: Mapping[str, Any]) -> dict[str, Any]:
    planned = {stage.get("name") or stage["kind"]: stage.get("steps") for stage in config["stages"]}
    stages = list(dict.fromkeys([*planned, *metrics["stage"].to_pylist(), *rollouts["stage"].to_pylist()]))
    known = [column for chart in CHARTS for column in (*chart.columns, chart.spread)]
    columns = {name: _numbers(metrics, name) for name in known if name in metrics.column_names}
    if "loss" in metrics.column_names:
        columns |= _losses(_numbers(metrics, "loss"), columns.get("reward"), columns.get("preferred"))
    drawn = [asdict(chart) for chart in CHARTS if any(_plottable(columns.get(name)) for name in chart.columns)]
    return {
        "stages": stages,
        "steps_planned": planned,
        "charts": drawn,
        "metrics": {
            "stage": [stages.index(stage) for stage in metrics["stage"].to_pylist()],
            "step": metrics["step"].to_pylist(),
            "update": metrics["update"].to_pylist(),
            "seconds": _numbers(metrics, "seconds"),
            "columns": columns,
        },
        "rollouts": _compact(rollouts, stages),
    }


def _losses(
    loss: list[float | None], reward: list[float | None] | None, preferred: list[float | None] | None
) -> dict[str, list[float | None]]:
    """Each kind of loss apart: on one axis a warm-up's cross-entropy flattens the policy loss to a line."""

    def kind(row: int) -> str:
        if reward and reward[row] is not None:
            return "policy_loss"
        return "preference_loss" if preferred and preferred[row] is not None else "cross_entropy"

    kinds = [kind(row) for row in range(len(loss))]
    return {
        name: [value if of == name else None for value, of in zip(loss, kinds, strict=True)]
        for name in ("cross_entropy", "preference_loss", "policy_loss")
    }


def _plottable(values: list[float | None] | None) -> bool:
    return values is not None and any(value is not None for value in values)


def _numbers(table: pa.Table, column: str) -> list[float | None]:
    return [_short(value) for value in table[column].to_pylist()]


def _short(value: float | None) -> float | None:
    """Six significant digits; null for what JSON cannot hold."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _compact(rollouts: pa.Table, stages: list[str]) -> dict[str, Any]:
    """Groups of samples; every string is stored once, token pieces by an index that is short for frequent ones."""
    rows = rollouts.select(ROLLOUT_VIEW.names).cast(ROLLOUT_VIEW).to_pylist()
    frequency = Counter(piece for row in rows for piece in row["tokens"])
    pieces = {piece: index for index, (piece, _) in enumerate(frequency.most_common())}
    strings: dict[str, int] = {}

    def stored(text: str | None) -> int:
        return strings.setdefault(text or "", len(strings))

    groups: dict[tuple[int, int, str], dict[str, Any]] = {}
    for row in rows:
        tokens, logprobs = row["tokens"], row["logprobs"]
        if len(tokens) != len(logprobs):
            raise RecordError(
                f"rollouts for the report: prompt {row['prompt_id']}, sample {row['sample_index']} has "
                f"{len(tokens)} tokens and {len(logprobs)} logprobs"
            )
        key = stages.index(row["stage"]), row["step"], row["prompt_id"]
        if key not in groups:
            stage, step, prompt_id = key
            prompt, reference = stored(row["prompt"]), stored(row["reference"])
            group = {"stage": stage, "step": step, "id": prompt_id, "prompt": prompt, "reference": reference}
            groups[key] = {**group, "samples": []}
        groups[key]["samples"].append(
            {
                "i": row["sample_index"],
                "tokens": [pieces[piece] for piece in tokens],
                "logprobs": [round(p * _LOGPROB_SCALE) if math.isfinite(p) else None for p in logprobs],
                "advantage": _short(row["advantage"]),
                "reward": _short(row["reward"]),
                "outcome": stored(row["outcome"]),
                "components": stored(row["components"]),
                "detail": stored(row["detail"]),
                "finish": stored(row["finish_reason"]),
            }
        )
    return {"pieces": list(pieces), "strings": list(strings), "groups": list(groups.values())}


def _inert(data: Any) -> Markup:
    """JSON that stays inside its <script> element whatever it holds."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
