"""Whether a row's column holds what it should: pydantic says so, and the error names the row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from srl_rlvr.errors import InputError

Value = TypeVar("Value")
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
NotNegative = Annotated[Number, Field(ge=0)]
TOO_LONG = 100_000


def take(row: Mapping[str, Any], column: str, kind: TypeAdapter[Value], expected: str, where: str) -> Value:
    """The column's value, of a `kind` that the error calls `expected`. Raises InputError that begins with `where`."""
    try:
        return kind.validate_python(row.get(column))
    except ValidationError as error:
        first = error.errors()[0]
        place = ", ".join(map(str, first["loc"]))
        inside = f"; at {place}: {first['msg'][0].lower()}{first['msg'][1:]}" if place else ""
        raise InputError(f"{where}: column '{column}' should be {expected}{inside}") from None


def text(row: Mapping[str, Any], column: str, where: str) -> str:
    """The column's text. Raises InputError where it is missing, or not text that is not empty, or too long."""
    if column not in row:
        raise InputError(f"{where}: column '{column}' is missing; it has {', '.join(row)}")
    value = row[column]
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise InputError(f"{where}: column '{column}' should be text that is not empty, not a number ({value}): write "
                         "what it stands for, as its name")  # fmt: skip
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: column '{column}' should be text that is not empty")
    return bounded(value, f"column '{column}'", where)


def bounded(value: str, name: str, where: str) -> str:
    """The text itself. Raises InputError where it has `TOO_LONG` characters or more: hardly any of it would be read."""
    if len(value) >= TOO_LONG:
        raise InputError(f"{where}: {name} has {len(value):,} characters; it should have fewer than {TOO_LONG:,}")
    return value
