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
    from srl_rlvr import pipeline, records
    from srl_rlvr.cli import inference
    from srl_rlvr.examples.files import Reading
    from srl_rlvr.reporting.result import mean_interval
    from srl_rlvr.stages import rlvr

    model = inference.read_model(options)
    model_type, card = model.model_type, model.card
    examples = model_type.load(options.data, "dev", Reading(options.limit, card=card, skip_bad=options.skip_bad))
    with inference.open_model(model, options.engine) as opened:
        began = time.monotonic()
        predictions = model_type.over_corpus(opened.engine, opened.tokenizer, options.data, options.limit)
        if predictions is None:
            prompts = rlvr.prompts(examples, opened.tokenizer, "evaluation", model.think)
            inference.check_fits(prompts, model)
            _, predictions = pipeline.evaluate(examples, opened.tokenizer, opened, model.think, model.max_tokens)
        scores = pipeline.counted(predictions)
        seconds = time.monotonic() - began
    name, found = model_type.metric, mean_interval(scores)
    if options.json:
        result = {
            "model_type": model_type.name,
            "n": len(scores),
            "metrics": {name: found.score} | model_type.metrics(predictions, card),
            "seconds": round(seconds, 2),
        }
        print(json.dumps(result))
    else:
        failed = sum(prediction["outcome"] == records.FAILED for prediction in predictions)
        note = f"; {failed} verifications failed and do not count" if failed else ""
        bounds = f"{found.low:.1%} to {found.high:.1%}"
        print(f"{name} {found.score:.1%} ({bounds}) of {len(scores)} problems in {seconds:.0f} s{note}")
    return 0
