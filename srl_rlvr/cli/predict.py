"""`srl-rlvr predict`: a model's answers to a file of problems, as JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from srl_rlvr.cli.eval import add_model_arguments
from srl_rlvr.errors import InputError

_AT_ONCE = 256  # prompts, some fills of an engine


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "predict",
        help="answer a file of problems",
        description="Greedy answers to every problem of a file, one JSON object a line: id, prompt, text, answer.",
        epilog="example:\n  srl-rlvr predict out/quickstart/model --data questions.jsonl --out answers.jsonl\n\n"
        "a row needs what its model type reads (a task LLM: 'question'); its answer, where it has one, is not read",
    )
    add_model_arguments(parser)
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to write (default: standard output)")
    return parser


def run(options: argparse.Namespace) -> int:
    from srl_rlvr.cli import inference
    from srl_rlvr.engines import SamplingSpec
    from srl_rlvr.examples.files import Reading
    from srl_rlvr.stages import rlvr

    if options.out is not None and not options.out.parent.is_dir():
        raise InputError(f"--out {options.out}: there is no folder {options.out.parent}")
    if options.out is not None and options.out.is_dir():
        raise InputError(f"--out {options.out}: it is a folder; name a file in it")
    model = inference.read_model(options)
    model_type, card = model.model_type, model.card
    how = Reading(
        options.limit, card=card, unanswered=True, skip_bad=options.skip_bad, verifiers=tuple(options.verifier)
    )
    examples = model_type.load(options.data, "dev", how)
    longest = model.max_tokens
    if model_type.policy == "ranking" and model_type.picks != 1:  # an order is of all candidates
        longest = max(map(len, examples["candidates"].to_pylist()), default=longest)
    with inference.open_model(model, options.engine) as opened:
        prompts = rlvr.prompts(examples, opened.tokenizer, "prediction", model.think)
        inference.check_fits(prompts, model)
        with _lines(options.out) as lines:
            for first in range(0, prompts.num_rows, _AT_ONCE):
                rollouts = opened.answer(prompts.slice(first, _AT_ONCE), SamplingSpec(1, 0.0, longest))
                asked = examples.slice(first, _AT_ONCE)
                for example, rollout in zip(asked.to_pylist(), rollouts.to_pylist(), strict=True):
                    answer = model_type.present(example, rollout, card)
                    lines.write(_line(example, rollout["text"], answer))
                lines.flush()
    if options.out is not None:
        print(f"{prompts.num_rows} answers in {options.out}")
    return 0


def _line(example: Mapping[str, Any], text: str, answer: Any) -> str:
    own_id = json.loads(example["provenance"]).get("id")
    row = {"id": example["id"] if own_id is None else own_id, "prompt": example["prompt"]}
    return json.dumps(row | {"text": text, "answer": answer}, ensure_ascii=False) + "\n"


@contextmanager
def _lines(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that takes its name once it is whole; what it has before that stays beside it."""
    if path is None:
        yield sys.stdout
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror})") from None
    try:
        with file:
            yield file
        os.replace(partial, path)
    finally:
        if partial.is_file():
            print(f"the answers before this are in {partial}", file=sys.stderr)
