"""What a replica makes of an answer that should be JSON."""

from __future__ import annotations

import pytest

from serve.errors import Refusal
from serve.replicas import _repaired

SCHEMA = {"type": "object", "properties": {"total": {"type": "number"}}}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"total": 4.50}', ('{"total": 4.50}', False)),
        ('Here: {"total": 4.5', ('{"total": 4.5}', True)),
        ('<think>{"total": 1}</think>{"total": 2}', ('{"total": 2}', False)),
    ],
)
def test_an_answer_is_the_json_that_it_has(text: str, found: tuple[str, bool]) -> None:
    assert _repaired(text, SCHEMA) == found


@pytest.mark.parametrize("text", ['{"total": NaN}', '{"total": 1e999}', "[" * 100_000, "none", '{"total": "x"}'])
def test_an_answer_of_which_no_json_can_be_made_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="answer"):
        _repaired(text, SCHEMA)
