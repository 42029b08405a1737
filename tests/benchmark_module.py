"""A module of `benchmarks/`, which is no package: its files import each other by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def load(name: str) -> Any:
    benchmarks = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, benchmarks)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(benchmarks)
