"""What `srl-rlvr tune` tries: the keys of a run file that vary, and where from their values are drawn."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from srl_rlvr import config as configs
from srl_rlvr.config import Section
from srl_rlvr.errors import InputError


class Values(Section):
    """One of the four."""

    choice: list[Any] | None = Field(default=None, min_length=1)
    """Any of these."""
    uniform: list[float] | None = Field(default=None, min_length=2, max_length=2)
    """Between two numbers."""
    log_uniform: list[float] | None = Field(default=None, min_length=2, max_length=2)
    """Between two positive numbers, every order of magnitude alike."""
    integer: list[int] | None = Field(default=None, min_length=2, max_length=2)
    """Between two whole numbers, both included."""

    @model_validator(mode="after")
    def _one_kind(self) -> Values:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}")
        for name in ("uniform", "log_uniform", "integer"):
            bounds = getattr(self, name)
            if bounds and not bounds[0] < bounds[1]:
                raise ValueError(f"{name} goes from the smaller to the larger number")
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ValueError("log_uniform needs positive numbers")
        return self


class SearchSpace(Section):
    trials: int = Field(default=16, ge=1)
    """Points that are tried."""
    concurrent: int = Field(default=1, ge=1)
    """Trials that run at once."""
    grace: int = Field(default=20, ge=1)
    """Updates that every trial makes before it can be stopped."""
    reduction: int = Field(default=3, ge=2)
    """Of so many trials one goes on at each rung, and the next rung is so many times as far."""
    keys: dict[str, Values] = Field(min_length=1)
    """Keys of the run file (as in `--set`), and their values."""


def load(path: Path, run_file: Path) -> SearchSpace:
    """The search space in the TOML file `path`, its keys checked against the run file.

    Raises InputError: the file is missing or no TOML, a key or value does not fit, the run has no dev problems.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        space = SearchSpace.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {configs.explain(error, SearchSpace)}") from None
    for key, values in space.keys.items():
        for value in values.choice or values.integer or values.uniform or values.log_uniform or []:
            try:
                configs.load(run_file, [override(key, value)])
            except InputError as error:
                raise InputError(f"{path}: {key} = {value!r} does not fit {run_file}: {error}") from None
    if not any(source.dev for source in configs.load(run_file).data):
        raise InputError(f"{run_file}: trials are compared on dev problems, and there are none: set data.dev")
    return space


def override(key: str, value: Any) -> str:
    """As `--set` takes it."""
    import tomli_w

    return f"{key}={tomli_w.dumps({'v': value}).removeprefix('v = ').strip()}"
