from __future__ import annotations

import pytest

from srl_rlvr.verifiers.units import is_known, same, units_of


@pytest.mark.parametrize(
    ("text", "units"),
    [
        (" kilometers", ["km"]),
        (" km per hour", ["kph"]),
        (" square meters", ["m²"]),
        (" meters squared", ["m²"]),
        ("\\text{ cm}^2", ["cm²"]),
        ("^\\circ", ["°"]),
        (" degrees Celsius", ["°C"]),
        (" m/s^2", ["m/s²"]),
        (" dollars", ["$"]),
        (" p.m.", ["pm"]),
        (" red apples", ["red", "apple"]),
        (" in total.", []),
        (" dollars left", ["$"]),
        (".", []),
    ],
)
def test_a_unit_has_one_symbol_however_it_is_written(text: str, units: list[str]) -> None:
    assert units_of(text) == units


def test_a_unit_may_be_left_out_but_not_be_another() -> None:
    assert same(["km"], []) and same([], ["km"]) and same(["km"], ["km", "in", "total"])
    assert not same(["km"], ["m"]) and not same(["km"], ["apple"])
    assert is_known("hours") and is_known("g") and not is_known("apples") and not is_known("G")
