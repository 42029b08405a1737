"""`srl-rlvr quickstart`: the main job, small, on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from srl_rlvr.cli import train

RUN_FILE = Path(__file__).parent / "quickstart.toml"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "quickstart",
        help="the main job, small, on this machine (about ten minutes on two cores)",
        description="Teach SmolLM2-135M-Instruct to add up four digits: SRL, then RLVR.",
        epilog=f"the run file is {RUN_FILE.name} in the package; `srl-rlvr train` runs your own",
    )
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
                        help="override a key of the run file; repeatable")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("out/quickstart"), help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in DIR")
    return parser


def run(options: argparse.Namespace) -> int:
    options.run_file, options.skip_bad = RUN_FILE, False
    return train.start(options, "quickstart")
