"""`srl-rlvr train`: one run file from base model to report."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from srl_rlvr import config as configs


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "train",
        help="train a model as a run file says",
        description="Train a model as RUN.toml says: base evaluation, the stages in order, evaluation after each.",
        epilog="writes DIR/model/, report.html, result.json, metrics.parquet, rollouts/, config.json, checkpoints/\n\n"
        "examples:\n"
        "  srl-rlvr train runs/gsm8k.toml\n"
        "  srl-rlvr train runs/gsm8k.toml --set stages.srl.steps=20 --set engine.kind=transformers\n"
        "  srl-rlvr train runs/gsm8k.toml --resume      go on where Ctrl-C or a crash ended it",
    )
    parser.add_argument("run_file", metavar="RUN.toml", type=Path, nargs="?")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
                        help="override a key of the run file (dotted; stages by name); repeatable")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the run (default: out/<name>)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in DIR")
    parser.add_argument("--skip-bad", action="store_true",
                        help="leave out rows that are wrong or too long, and say how many")  # fmt: skip
    parser.add_argument("--keys", action="store_true", help="list every key of a run file and exit")
    parser.add_argument("--families", action="store_true", help="list the generated families and exit")
    return parser


def run(options: argparse.Namespace) -> int:
    if options.keys:
        for key, default, sentence in configs.documented_keys():
            print(f"{key} = {default}\n    {sentence}")
        return 0
    if options.families:
        _print_families()
        return 0
    if options.run_file is None:
        raise configs.InputError("name a run file: srl-rlvr train RUN.toml")
    return start(options, "train", str(options.run_file))


def start(options: argparse.Namespace, *command: str) -> int:
    """Run `options.run_file`, as `srl-rlvr` with this `command` does."""
    config = configs.load(options.run_file, options.overrides)
    for source in config.data:
        source.skip_bad = source.skip_bad or options.skip_bad
    from srl_rlvr.cli import session

    out = options.out or Path("out") / config.name
    flags = [*(f"--set={each}" for each in options.overrides), *(["--skip-bad"] if options.skip_bad else [])]
    again = shlex.join(["srl-rlvr", *command, *flags, "--out", str(out), "--resume"])
    return session.train(config, out, options.resume, again)


def _print_families() -> None:
    from srl_rlvr.examples import families, generated

    for name in families.FAMILIES:
        example = generated.generate(name, 1, seed=0).to_pylist()[0]
        print(
            f"{name}\n    {' '.join(example['prompt'].split())[:110]}\n    steps: {' | '.join(example['steps'])[:110]}"
        )
