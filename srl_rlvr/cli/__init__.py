"""The commands. Each is one file with `add_parser` and `run`; this one dispatches and turns errors into exit codes.

The commands are where everything is put together: they alone import `actors`, and only when they run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import srl_rlvr
from srl_rlvr.errors import InputError, RunError

_COMMANDS = ("quickstart", "train", "eval", "predict", "serve", "tune", "base", "submit", "doctor")

_DESCRIPTION = """\
Teach a small language model a narrow job: first by Supervised Reinforcement Learning (each step of an expert's
worked solution is asked for and rewarded by similarity), then by Reinforcement Learning with Verifiable Rewards
(whole problems, rewarded by a checker)."""

_EPILOG = """\
first steps:
  srl-rlvr quickstart                       the whole job, small, on this machine
  srl-rlvr train runs/gsm8k.toml            a run of your own: copy and change that file
  srl-rlvr eval out/gsm8k/model --data FILE
  srl-rlvr train --keys                     every key of a run file, with its default and meaning

exit codes: 0 done, 1 the run failed, 2 bad input, 130 stopped by Ctrl-C (everything finished is saved)"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    # Model hubs are asked only when a base is given by its id; checks for newer files would only slow us down.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with contextlib.suppress(FileNotFoundError):  # where a verifier of the user's own may lie, as under `python -m`
        sys.path.append(os.getcwd())
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
    except (InputError, RunError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 1
    except Exception as error:
        if options.debug:
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"error: {type(error).__name__}: {first} (this is a defect; --debug shows where)", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.exit(code)


def stay_on_this_machine() -> None:
    """Have the Ray that a command starts listen on 127.0.0.1 alone. To be called before Ray is imported.

    Ray replaces a loopback address that it is given by the machine's own, unless it is told that it has no cluster.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="srl-rlvr",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"srl-rlvr {srl_rlvr.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        module = importlib.import_module(f"srl_rlvr.cli.{name}")
        command = module.add_parser(commands)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.set_defaults(run=module.run)
    return parser
