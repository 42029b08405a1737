"""`srl-rlvr eval`: how many problems of a file a model solves."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    from srl_rlvr.cli import inference

    parser = commands.add_parser(
        "eval",
        help="score a model on a file",
        description="Greedy answers to every problem of a file, scored by the problems' own verifiers.",
        epilog="example:\n  srl-rlvr eval out/gsm8k/model --data ../data/gsm8k --limit 100 --json",
    )
    inference.add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(options: argparse.Namespace) -> int:
    from srl_rlvr import pipeline
    from srl_rlvr.cli import inference
    from srl_rlvr.examples import files
    from srl_rlvr.reporting.result import interval
    from srl_rlvr.stages import rlvr

    examples = files.load(options.data, "dev", options.limit)
    with inference.open_model(options) as model:
        began = time.monotonic()
        prompts = rlvr.prompts(examples, model.tokenizer, "evaluation", model.think)
        inference.check_fits(prompts, model.max_context)
        solved, judged, _ = pipeline.evaluate(examples, model.tokenizer, model, model.think, model.max_tokens)
        seconds = time.monotonic() - began
    accuracy = interval(solved, judged)
    failed = examples.num_rows - judged
    if options.json:
        found = {
            "model_type": "task_llm",
            "n": judged,
            "metrics": {"accuracy": accuracy.score},
            "seconds": round(seconds, 2),
        }
        print(json.dumps(found))
    else:
        bounds = f"{accuracy.low:.1%} to {accuracy.high:.1%}"
        note = f"; {failed} verifications failed and do not count" if failed else ""
        print(f"accuracy {accuracy.score:.1%} ({bounds}) of {judged} problems in {seconds:.0f} s{note}")
    return 0
