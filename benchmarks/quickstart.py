"""What the quickstart promises: minutes, pass rates before and after, and the peak memory of both engines.

    python benchmarks/quickstart.py            the whole quickstart, then a short run with the transformers engine
    python benchmarks/quickstart.py --quick    the same with a model of 4 million parameters, one update a stage

Prints a table and one JSON line. Memory is the peak proportional set size of the run's whole process tree.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _machine import SMALL, tell

# Enough of each stage to reach the peak of memory: the largest batches come in every step.
_SHORT = ["stages.srl.steps=2", "stages.rlvr.steps=2", "data.0.held_out=32"]
_QUICK = [f"model.base={SMALL}", "stages.srl.steps=1", "stages.rlvr.steps=1", "data.0.held_out=4", "data.0.train=16",
          "stages.srl.prompts_per_step=2", "stages.rlvr.prompts_per_step=2", "stages.srl.max_refills=0",
          "stages.rlvr.max_refills=0", "data.0.dev=0", "evaluation.max_tokens=24",
          "tracking.mlflow=false"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    vllm = _run([*(_QUICK if quick else [])])
    fallback = _run(["engine.kind=transformers", *(_QUICK if quick else _SHORT)])
    held_out = vllm["held_out"]
    figures = {"minutes": vllm["minutes"], "sampled_tokens": vllm["sampled_tokens"]}
    for label in (label for label in held_out if label != "n"):
        of = held_out[label]
        figures |= {label: of["score"], f"{label}_low": of["low"], f"{label}_high": of["high"]}
    figures["peak_memory_gib_vllm"] = vllm["peak_memory_gib"]
    figures["peak_memory_gib_transformers"] = fallback["peak_memory_gib"]
    print(f"{'figure':<30} value")
    for name, value in figures.items():
        print(f"{name:<30} {value}")
    tell("quickstart", figures, whole=not quick)


def _run(overrides: list[str]) -> dict[str, Any]:
    """result.json of one quickstart in a folder of its own; its output goes to standard error."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "srl_rlvr", "quickstart", "--out", f"{folder}/run"]
        for override in overrides:
            command += ["--set", override]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return json.loads(Path(folder, "run", "result.json").read_text())


if __name__ == "__main__":
    main()
