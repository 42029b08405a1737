"""`srl-rlvr submit`: a run on a Ray cluster, as `ray job submit` would do it, with what it needs."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import logging
import os
import shlex
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from srl_rlvr import config as configs
from srl_rlvr.config import RunConfig
from srl_rlvr.errors import InputError, RunError, Stopped

log = logging.getLogger(__name__)

_POLL_S = 1.0
_CONNECT_DEADLINE_S = 10.0
_AGENT_DEADLINE_S = 60.0
_STOP_WAIT_S = 600  # that `ray job stop` leaves a run to finish its step and save; Ray's own is 3
# What a working tree holds beside the code, and a cluster does not need.
_EXCLUDES = [".git", ".venv", "out", "**/__pycache__", "*.egg-info", ".pytest_cache", ".ruff_cache"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "submit",
        help="run a run file on a Ray cluster",
        description="Send the working folder and a run file to a Ray cluster and follow the job's output.",
        epilog="the same by hand:\n"
        "  ray job submit --address ADDRESS --working-dir . -- python -m srl_rlvr train RUN.toml\n\n"
        "ADDRESS is the dashboard's, for example http://127.0.0.1:8265. Clusters with token authentication (Ray's\n"
        "default) need RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH here as on the head.",
    )
    parser.add_argument("address", metavar="ADDRESS", help="the cluster's dashboard, http://HOST:8265")
    parser.add_argument("run_file", metavar="RUN.toml", type=Path, help="must lie below the working folder")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
                        help="override a key of the run file; repeatable")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder of the run, on the cluster: best an absolute, shared one")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in DIR")
    parser.add_argument("--working-dir", metavar="DIR", type=Path, default=Path("."), help="what is sent (default: .)")
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and return")
    return parser


def run(options: argparse.Namespace) -> int:
    config = configs.read(options.run_file, options.overrides)  # faults are found here and not on the cluster
    folder = options.working_dir.resolve()
    if not options.run_file.resolve().is_relative_to(folder):
        raise InputError(f"{options.run_file} is not below {folder}, which is what the cluster is sent: copy it there")
    if not (folder / "srl_rlvr").is_dir():
        raise InputError(f"{folder} does not hold the project (srl_rlvr/): run this there, or name it by --working-dir")
    words = ["python", "-m", "srl_rlvr", "train", str(options.run_file.resolve().relative_to(folder))]
    for override in options.overrides:
        words += ["--set", override]
    words += ["--out", options.out] if options.out else []
    words += ["--resume"] if options.resume else []
    sent = _to_send(folder)
    _check_size(folder, sent)
    _check_paths(config, options.run_file.absolute(), folder, sent)
    client = _client(options.address)
    environment = {
        "working_dir": str(folder),
        "excludes": _EXCLUDES,
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)},
    }
    print(f"sending {len(sent)} files, {sum(sent.values()) / 2**20:.1f} MiB", flush=True)
    try:
        job = _submitted(client, shlex.join(words), environment)
    except (OSError, RuntimeError) as error:
        if "413" in str(error):
            raise InputError(_too_large(folder, sent, f"more than {options.address} takes")) from None
        raise RunError(f"{options.address} did not take the job: {_first_line(error)}") from None
    print(f"job {job} on {options.address}: {shlex.join(words)}")
    if options.no_wait:
        print(f"follow it: ray job logs --follow --address {options.address} {job}")
        return 0
    try:
        return _follow(client, job)
    except (KeyboardInterrupt, OSError, RuntimeError) as error:  # the last two: the connection is lost
        goes_on = (
            f"job {job} goes on; follow it: ray job logs --follow --address {options.address} {job}; "
            f"stop it: ray job stop --address {options.address} {job}"
        )
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(goes_on) from None
        raise RunError(f"the connection to {options.address} is lost: {_first_line(error)}; {goes_on}") from None


def _to_send(folder: Path) -> dict[Path, int]:
    """Size in bytes of each file that Ray would send, by its path in `folder`.

    Raises InputError if a link leads back to a folder above it: Ray would follow it over and over.
    """
    from ray._private.runtime_env import packaging  # the walk by which the client packs a working folder

    found: dict[Path, int] = {}

    def visit(path: Path) -> None:
        if path.is_symlink() and path.is_dir() and path.parent.resolve().is_relative_to(path.resolve()):
            raise InputError(f"{path} links to a folder that holds it, which cannot be sent: remove the link")
        if path.is_file():
            found[path.relative_to(folder)] = path.stat().st_size

    packaging._dir_travel(folder, [packaging._get_excludes(folder, _EXCLUDES)], visit, _reads_gitignore(), log)
    return found


def _reads_gitignore() -> bool:
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE

    return os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"


def _check_size(folder: Path, sent: dict[Path, int]) -> None:
    """Raises InputError if the dashboard would refuse so large a package. (Ray packs without compression.)"""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE as most

    if sum(sent.values()) > most:
        raise InputError(_too_large(folder, sent, f"and Ray takes at most {most / 2**20:.0f} MiB"))


def _too_large(folder: Path, sent: dict[Path, int], limit: str) -> str:
    largest = sorted(sent, key=lambda path: -sent[path])[:3]
    named = ", ".join(f"{path} ({sent[path] / 2**20:.1f} MiB)" for path in largest)
    return (
        f"the working folder {folder} has {sum(sent.values()) / 2**20:.1f} MiB to send, {limit}; the largest: {named}: "
        "name them in .rayignore, and read large data from a path that the cluster shares"
    )


def _check_paths(config: RunConfig, run_file: Path, folder: Path, sent: dict[Path, int]) -> None:
    """Raises InputError if the run names a file or folder that is here and would be missing on the cluster. An absolute
    path is the cluster's."""
    named = {"model.base": config.model.base}
    for number, source in enumerate(config.data):
        named |= {f"data[{number}].path": source.path, f"data[{number}].held_out_path": source.held_out_path}
    for key, value in named.items():
        here = Path(os.path.normpath(run_file.parent / value))
        if not value or Path(value).expanduser().is_absolute() or not here.exists():
            continue
        if not here.is_relative_to(folder):
            raise InputError(
                f"{key}: {value} lies outside the working folder {folder}, so the cluster would not have it: copy it "
                "there, or name a path that the cluster shares"
            )
        if not any(path.is_relative_to(here.relative_to(folder)) for path in sent):
            raise InputError(
                f"{key}: {value} is not sent, as .gitignore, .rayignore or submit itself ({', '.join(_EXCLUDES)}) "
                "leaves it out: move it, or name a path that the cluster shares"
            )


def _submitted(client: Any, entrypoint: str, environment: dict[str, Any]) -> str:
    """The job's id. Raises as the client; a head that has just started is given time for its agent to answer."""
    until = time.monotonic() + _AGENT_DEADLINE_S
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=environment)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(_POLL_S)


def _client(address: str) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):  # they tell of each upload
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    if not address.startswith(("http://", "https://")):
        raise InputError(f"'{address}' is no address of a dashboard: write http://HOST:8265")
    try:
        _knock(address)
        return JobSubmissionClient(address)
    except http.client.HTTPException:
        raise InputError(f"{address} is no dashboard: what listens there does not speak HTTP; write http://HOST:8265, "
                         "the dashboard's port and not the GCS's") from None  # fmt: skip
    except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
        raise InputError(
            f"cannot reach the Ray cluster at {address}: {_first_line(error)}; is its dashboard running there, and are "
            "RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH set as on its head?"
        ) from None


def _knock(address: str) -> None:
    """Raises OSError where no web server answers at `address`: Ray's client would wait for ever."""
    with contextlib.suppress(urllib.error.HTTPError):  # it wants a token, or has no page here: it is there
        urllib.request.urlopen(address, timeout=_CONNECT_DEADLINE_S).close()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _follow(client: Any, job: str) -> int:
    """Print the job's output as it comes; raises RunError where it fails."""
    printed = 0
    while True:
        status = client.get_job_status(job)
        logs = client.get_job_logs(job)
        print(logs[printed:], end="", flush=True)
        printed = len(logs)
        if status.is_terminal():
            if status.value != "SUCCEEDED":
                # The message repeats the output that is printed already, below its first line.
                reason = (client.get_job_info(job).message or "no reason given").splitlines()[0]
                raise RunError(f"job {job} ended as {status.value}: {reason.partition(', last available logs')[0]}")
            return 0
        time.sleep(_POLL_S)
