"""One killable process of the pool: `python -P -m srl_rlvr.verifiers.worker FD DEADLINE_S [OWN_VERIFIER …]`.

Takes chunks of items from its end of a pipe and sends each verdict back as soon as it is known. It does
not know the time: whether an item has overrun is the pool's business. It imports no pyarrow, to start fast.

    pool → worker   [(row, verifier, text, reference, metadata JSON, finish reason), …]
    worker → pool   ("ready",)                 once, when it can take chunks
                    ("started",)               imports are done: the clock of the chunk's first item runs
                    ("verdict", row, outcome, reward, components JSON, detail)
                    ("input_error", message)   the run is set up wrongly; ends it
"""

from __future__ import annotations

import json
import numbers
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from srl_rlvr.errors import InputError
from srl_rlvr.verifiers import find_verifier
from srl_rlvr.verifiers.base import INVALID, SCORED, Score, Verifier

Item = tuple[int, str, str, str, str, str]
Outcome = tuple[str, float, str, str]  # outcome, reward, components JSON, detail

FAILED = "failed"
ORPHAN_GRACE_S = 10.0
MEMORY_LIMIT_BYTES = 8 << 30  # address space: one runaway power of sympy's must not take the learner with it
LARGEST_FLOAT32 = 3.4e38  # what the Verdict table can hold
LONGEST_DETAIL = 500


def main() -> None:
    connection, deadline_s, own = Connection(int(sys.argv[1])), float(sys.argv[2]), sys.argv[3:]
    os.dup2(2, 1)  # what a verifier prints must not end up in a command's output
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard_limit == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))
    try:
        connection.send(("ready",))
        while True:
            _score_chunk(connection, connection.recv(), deadline_s, own)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the pool closed its end, or its process is gone


def _score_chunk(connection: Connection, chunk: list[Item], deadline_s: float, own: list[str]) -> None:
    try:
        prepared = [_prepare(item, own) for item in chunk]
        connection.send(("started",))
        for (row, _, text, reference, _, _), (verifier, metadata, fault) in zip(chunk, prepared, strict=True):
            # The pool kills what overruns. Where the pool itself was killed, nobody does: the kernel's alarm,
            # whose default is to end the process, is for that. It works in C code that never yields, too.
            signal.setitimer(signal.ITIMER_REAL, deadline_s + ORPHAN_GRACE_S)
            outcome = _failed(fault) if fault else _score(verifier, text, reference, metadata)
            connection.send(("verdict", row, *outcome))
    except InputError as error:
        connection.send(("input_error", str(error)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _prepare(item: Item, own: list[str]) -> tuple[Verifier, dict[str, Any], str]:
    """The verifier, imported and warm, the item's own metadata, and what went wrong ("" for nothing)."""
    _, name, _, _, metadata_json, finish_reason = item
    verifier = find_verifier(name, own)
    metadata = {**json.loads(metadata_json), "finish_reason": finish_reason}
    warm_up = getattr(sys.modules.get(getattr(verifier, "__module__", "")), "warm_up", None)
    try:
        if warm_up:
            warm_up(metadata)
    except InputError:
        raise
    except Exception as error:
        return verifier, metadata, f"{type(error).__name__}: {error}"
    return verifier, metadata, ""


def _score(verifier: Verifier, text: str, reference: str, metadata: dict[str, Any]) -> Outcome:
    try:
        return _checked(verifier(text, reference, metadata))
    except InputError:
        raise
    except Exception as error:
        return _failed(f"{type(error).__name__}: {error}")


def _checked(score: object) -> Outcome:
    if isinstance(score, numbers.Real) or type(score).__name__ == "bool":  # numpy's bool is no number
        reward = float(score)  # type: ignore[arg-type]
        if not 0 <= reward <= 1:
            return _failed(f"returned {reward} as reward; a plain number should be from 0 to 1")
        score = Score(SCORED, reward)
    if not isinstance(score, Score):
        return _failed(f"returned a {type(score).__name__}; it should return a Score or a number from 0 to 1")
    if score.outcome not in (SCORED, INVALID):
        return _failed(f"returned the outcome {score.outcome!r}, not '{SCORED}' or '{INVALID}'")
    named = {"reward": score.reward, **score.components}
    for name, value in named.items():
        if not isinstance(value, numbers.Real):
            return _failed(f"returned a {type(value).__name__} as {name}")
        if not abs(value) <= LARGEST_FLOAT32:  # so written, NaN is caught, too
            return _failed(f"returned {float(value)} as {name}")
    components = {str(name): float(value) for name, value in score.components.items()}
    return score.outcome, float(score.reward), json.dumps(components), _printable(score.detail)


def _failed(detail: str) -> Outcome:
    return FAILED, 0.0, "{}", _printable(detail)


def _printable(detail: object) -> str:
    # A lone surrogate cannot become an Arrow string, and would cost the whole batch its verdicts.
    return str(detail)[:LONGEST_DETAIL].encode("utf-8", "replace").decode()


if __name__ == "__main__":
    main()
