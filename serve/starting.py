"""Waiting for applications of Ray Serve: which are still awaited, for how long, and why one does not start."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.api import RunTarget
from ray.serve.exceptions import RayServeException

from actors.cluster import session_folder
from srl_rlvr.engines import start_advice
from srl_rlvr.errors import InputError, RunError

T = TypeVar("T")

_LOOKED_EVERY_S = 0.5
_TOLD_EVERY_S = 15.0
_CALL_DEADLINE_S = 60.0  # of one call to Serve's controller
_LONGEST_CAUSE = 300
_INPUT_ERROR = f"{InputError.__module__}.{InputError.__name__}: "
# vLLM's engine is a process of its own: what its parent raises says no more than that it ended.
_SAYS_NOTHING = re.compile(r"Engine core initialization failed|EngineDeadError|Traceback \(most recent call last\)")


class NotStartedError(RunError):
    """An application does not start; the message says whose and why."""


def run(
    targets: Mapping[str, tuple[Any, Sequence[str]]],
    deadline_s: float,
    say: Callable[[str], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Deploy applications by their names, each with the models that it answers for, and wait until all run.

    Raises NotStartedError if one does not, if the deadline is over, or if it is `stopped` before.
    """
    began = time.monotonic()
    deploy = [RunTarget(application, name, route_prefix=None) for name, (application, _) in targets.items()]
    _within(_CALL_DEADLINE_S, "deploy", lambda: ray_serve.run_many(
        deploy, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    ))  # fmt: skip
    waiting, told, said = {name: ", ".join(of) for name, (_, of) in targets.items()}, began, ""
    while waiting:
        status = _within(_CALL_DEADLINE_S, "say how it is", ray_serve.status).applications
        for name in [name for name in waiting if name in status]:
            said = " ".join([each.message for each in status[name].deployments.values()]) or said
            if status[name].status == "RUNNING":
                ready, told = waiting.pop(name), time.monotonic()
                say(_progress(f"{ready}: ready", waiting, told - began))
            elif why := failure(name, status[name]):
                raise NotStartedError(f"model '{waiting[name]}' does not start: {why}")
        taken = time.monotonic() - began
        if waiting and time.monotonic() - told > _TOLD_EVERY_S:
            told = time.monotonic()
            say(_progress("", waiting, taken))
        if waiting and taken > deadline_s:
            last = f"; the last that was heard: {cause_of(said)}" if said else ""
            raise NotStartedError(
                f"waited {taken:.0f} s for {', '.join(waiting.values())} to start{last}; "
                "if it is only slow, raise start_deadline_s"
            )
        if waiting and stopped():
            raise NotStartedError("serving ends")
        time.sleep(_LOOKED_EVERY_S if waiting else 0)


def failure(application: str, status: Any) -> str:
    """Return why the application does not start, or nothing while it may. A model that cannot be read is not tried
    again, as Serve would; what else keeps a replica from starting may pass."""
    message = "\n".join(of.message for of in status.deployments.values() if of.message) or status.message
    hopeless = "failed to start" in message and _INPUT_ERROR in _last_error(message)
    if status.status not in ("DEPLOY_FAILED", "UNHEALTHY") and not hopeless:
        return ""
    cause = cause_of(message)
    if _SAYS_NOTHING.search(cause):
        cause = cause_of(_engine_log(application)) or cause
    return start_advice(cause) or "Ray Serve gives no cause"


def cause_of(text: str) -> str:
    """Return the error at the end of a traceback, in one line."""
    return " ".join(_last_error(text).removeprefix(_INPUT_ERROR).split())[:_LONGEST_CAUSE]


def _last_error(text: str) -> str:
    """What comes after the last line of code of a traceback; of several, the last that says anything."""
    errors = []
    lines = [re.sub(r"^\((?:EngineCore|Worker|APIServer)[^)]*\)\s?", "", line) for line in text.strip().splitlines()]
    lines = [re.sub(r"^(?:ERROR|WARNING|INFO) [\d-]+ [\d:.]+ \[[^\]]*\] ", "", line) for line in lines]
    for before, line in zip(["", *lines], lines, strict=False):
        if re.match(r"[\w.]+(?:Error|Exception|Interrupt|Exit|Warning)?: ?\S", line) and before.startswith("  "):
            errors.append([line])
        elif errors and line and not line.startswith((" ", "Traceback", "During handling", "The above exception")):
            errors[-1].append(line)
    telling = [error for error in errors if not _SAYS_NOTHING.search(error[0])] or errors
    return "\n".join(telling[-1]) if telling else (lines[-1] if lines else "")


def _engine_log(application: str) -> str:
    """The end of what the application's newest replica wrote, if it ran on this machine."""
    logs = [path for path in (session_folder() / "logs").glob("worker-*.err") if path.is_file()]
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(logs, key=_changed, reverse=True))
    return next((text[-100_000:] for text in texts if f":actor_name:ServeReplica:{application}:" in text), "")


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def _progress(news: str, waiting: Mapping[str, str], taken: float) -> str:
    awaited = f"waiting for {', '.join(waiting.values())}" if waiting else ""
    return "; ".join(part for part in (news, awaited) if part) + f" ({taken:.0f} s)"


def _within(deadline_s: float, what: str, call: Callable[[], T]) -> T:
    """What `call` returns. Raises NotStartedError after the deadline: Serve's own calls wait for ever if its
    controller dies again and again."""
    found: list[T] = []
    failed: list[Exception] = []

    def run_it() -> None:
        try:
            found.append(call())
        except (RayError, RayServeException, RuntimeError, ValueError) as error:
            failed.append(error)

    thread = threading.Thread(target=run_it, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if failed:
        raise NotStartedError(f"Ray Serve does not {what}: {cause_of(str(failed[0]))}") from failed[0]
    if not found:
        raise NotStartedError(f"waited {deadline_s:.0f} s for Ray Serve's controller to {what}; see its logs")
    return found[0]
