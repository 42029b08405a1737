"""Families → Example tables: as many distinct problems as asked for, the same for the same seed.

Held-out problems are drawn before training problems and kept out of them by id. This module knows reasoning-gym's
factory; it must not know how any family is solved or scored.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import random
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from srl_rlvr import records
from srl_rlvr.errors import InputError
from srl_rlvr.examples.families import FAMILIES, prompt
from srl_rlvr.examples.names import nearest

MODEL_TYPE = "task_llm"
TRIES_AT_LEAST = 1_000
TRIES_FOR_EACH = 20  # a family of N problems is exhausted after about N·ln N draws


def generate(
    family: str,
    count: int,
    seed: int = 0,
    params: Mapping[str, Any] | None = None,
    exclude: Collection[str] = frozenset(),
) -> pa.Table:
    """`count` distinct Examples of a family, none with an id in `exclude`; a longer table begins with a shorter one.

    Raises InputError where the family, a param or its value is not known, or where the family with these params does
    not hold that many distinct problems.
    """
    if count < 0:
        raise InputError(f"family '{family}': count is {count}; it should be 0 or more")
    tries = TRIES_AT_LEAST + TRIES_FOR_EACH * (count + len(exclude))
    seen = set(exclude)
    rows: list[dict[str, Any]] = []
    if count:
        for row in _draw(family, seed, dict(params or {}), tries):
            if row["id"] not in seen:
                seen.add(row["id"])
                rows.append(row)
                if len(rows) == count:
                    break
    if len(rows) < count:
        wanted = f"{count} beside {len(exclude)} excluded" if exclude else str(count)
        raise InputError(
            f"family '{family}' gave {len(rows)} distinct examples in {tries} tries, {wanted} were asked for: "
            f"ask for fewer or widen params {_as_json(_checked_params(family, params or {}))}"
        )
    return records.build("Example", rows)


def generate_split(
    family: str, *, train: int, held_out: int, dev: int = 0, seed: int = 0, params: Mapping[str, Any] | None = None
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """(train, dev, held-out) without a common id; none depends on the size of those before it. Raises as `generate`."""
    kept_back = generate(family, held_out, seed, params)
    taken = set(kept_back["id"].to_pylist())
    set_apart = generate(family, dev, seed, params, exclude=taken)
    return generate(family, train, seed, params, taken | set(set_apart["id"].to_pylist())), set_apart, kept_back


def _draw(family: str, seed: int, params: dict[str, Any], tries: int) -> Iterator[dict[str, Any]]:
    import reasoning_gym

    resolved = _checked_params(family, params)
    dataset = FAMILIES[family].dataset
    # Item i is drawn with seed + i there: neighboring seeds would share all but one of their items.
    stream = random.Random(f"{family}:{seed}").randrange(2**31)
    provenance = {
        "source": "reasoning-gym",
        "version": version("reasoning-gym"),
        "family": family,
        "params": resolved,
        "seed": seed,
        "dataset_seed": stream,
    }
    try:
        source = reasoning_gym.create_dataset(dataset, seed=stream, size=tries, **resolved)
    except (AssertionError, ValueError, TypeError, ArithmeticError, OSError) as error:
        raise _refused(family, resolved, error) from None
    for index in range(tries):
        try:
            item = source[index]
        except (AssertionError, ValueError, TypeError, ArithmeticError, LookupError) as error:
            raise _refused(family, resolved, error) from None
        entry = {"question": item["question"], "answer": item["answer"], "metadata": item["metadata"]}
        steps = FAMILIES[family].expert(item)
        if not steps or not item["answer"]:
            continue
        yield records.example(
            model_type=MODEL_TYPE,
            task=family,
            prompt=prompt(item),
            steps=steps,
            reference=item["answer"],
            verifier="reasoning_gym",
            metadata={"dataset": dataset, "entry": entry},
            difficulty=len(steps),
            provenance={**provenance, "index": index},
        )


def _checked_params(family: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The family's params with the user's over them, each of its config field's type."""
    from reasoning_gym.factory import DATASETS

    if family not in FAMILIES:
        raise InputError(f"family '{family}' is not known{nearest(family, FAMILIES)}")
    config = DATASETS[FAMILIES[family].dataset][1]
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.name not in ("seed", "size")}
    checked = dict(FAMILIES[family].params)
    for name, value in params.items():
        if name not in defaults:
            raise InputError(f"family '{family}' has no param '{name}'{nearest(name, defaults)}")
        checked[name] = _as_type_of(defaults[name], value, f"family '{family}', param '{name}'")
    return checked


def _as_type_of(default: Any, value: Any, where: str) -> Any:
    """`value` as TOML or JSON gave it, in the type of a config field whose default is `default`."""
    match default:
        case enum.Enum():
            allowed = [member.value for member in type(default)]
            if value not in allowed:
                raise InputError(f"{where} is {value!r}; it should be one of {', '.join(map(str, allowed))}")
            return type(default)(value)
        case bool():
            expected, fits = "true or false", isinstance(value, bool)
        case int():
            expected, fits = "a whole number", isinstance(value, int) and not isinstance(value, bool)
        case float():
            expected, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
        case str():
            expected, fits = "text", isinstance(value, str)
        case _:
            # tuples and lists, whose defaults may come from a factory
            expected, fits = "a list", isinstance(value, list | tuple)
    if not fits:
        raise InputError(f"{where} is {value!r}; it should be {expected}")
    return value


def _refused(family: str, params: Mapping[str, Any], error: Exception) -> InputError:
    return InputError(f"family '{family}' does not take params {_as_json(params)}: {' '.join(str(error).split())}")


def _as_json(params: Mapping[str, Any]) -> str:
    return json.dumps(params, default=str)
