"""Verifiers that do what verifiers must not, reached by name: "bad_verifiers:hang". A text chooses whether."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from srl_rlvr.errors import InputError
from srl_rlvr.verifiers.base import SCORED, Score

GOOD = Score(SCORED, 1.0, {"correct": 1.0})


def hang(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    while text == "bad":
        pass
    return GOOD


def hang_without_yielding(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """In C code that keeps the interpreter's lock."""
    if text == "bad":
        pow(7, 10**9)
    return GOOD


def leave(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    if text == "bad":
        os._exit(7)
    return GOOD


def die_by_signal(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    if text == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    return GOOD


def misbehave(text: str, reference: str, metadata: dict[str, Any]) -> Any:
    """Raises or returns what the text says."""
    match text:
        case "raise":
            raise ValueError("no such thing")
        case "surrogate":
            raise ValueError("\ud800")
        case "memory":
            return bytearray(1 << 40)
        case "recursion":
            return misbehave(text, reference, metadata)
        case "exit":
            sys.exit(3)
        case "nan":
            return Score(SCORED, float("nan"))
        case "infinite":
            return Score(SCORED, 1.0, {"part": float("inf")})
        case "too large":
            return Score(SCORED, 1e300)
        case "number":
            return 1
        case "half":
            return 0.5
        case "two":
            return 2
        case "dict":
            return {"score": 1.0}
        case "true" | "false":
            return text == "true"
        case "numpy true":
            return np.bool_(True)
        case "numpy float":
            return np.float32(0.25)
        case "text":
            return Score(SCORED, "1.0")  # type: ignore[arg-type]
        case "outcome":
            return Score("splendid", 1.0)
        case "print":
            print("chatter")
    return GOOD


def echo(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    return Score(SCORED, float(text), {}, f"{reference} {metadata['finish_reason']} {metadata.pop('note')}")


def refuse(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    raise InputError("set up wrongly")


def count_starts(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    """Notes each start in the file that the reference names, then hangs."""
    with Path(reference).open("a") as notes:
        notes.write(f"{text}\n")
    while text == "bad":
        time.sleep(1)
    return GOOD


def as_verl(data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None) -> float:
    return 1.0


def as_trl(completions: Any, **more: Any) -> list[float]:
    return [1.0]


def start_a_child(text: str, reference: str, metadata: dict[str, Any]) -> Score:
    child = subprocess.Popen(["sleep", "600"])
    Path(reference).write_text(f"{os.getpid()} {child.pid}")
    child.wait()
    return GOOD
