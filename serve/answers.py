"""JSON that fits a schema, from what a model wrote. Runs in the sandbox: a small schema can take forever to check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from serve.errors import Refusal
from srl_rlvr.verifiers.answers import without_thoughts
from srl_rlvr.verifiers.structures import read_json, validator


def repaired(text: str, schema: Mapping[str, Any]) -> tuple[str, bool]:
    """Return JSON that fits the schema, and whether the text was not. Raises Refusal if none can be made of it."""
    from jsonschema.exceptions import ValidationError
    from partial_json_parser import loads
    from referencing.exceptions import Unresolvable

    text = without_thoughts(text)
    begin = min((at for at in (text.find("{"), text.find("[")) if at >= 0), default=0)
    try:
        try:
            found, was_repaired = read_json(text), False
        except ValueError:
            found, was_repaired = read_json(json.dumps(loads(text[begin:]))), True
    except (ValueError, RecursionError):
        raise Refusal(422, f"the model's answer is no JSON: {text[:200]!r}", "invalid_answer") from None
    try:
        validator(schema).validate(found)
    except Unresolvable as error:
        raise Refusal(400, f"schema refers to '{error.ref[:100]}', which is not in it", param="schema") from None
    except (RecursionError, ValueError, ArithmeticError):
        said = "the schema cannot be checked: it refers to itself without end, or a bound in it is too large"
        raise Refusal(400, said, param="schema") from None
    except ValidationError as error:
        said = f"the model's answer does not fit the schema ({error.message[:200]}): {text[:200]!r}"
        raise Refusal(422, said, "invalid_answer") from None
    return (json.dumps(found, ensure_ascii=False) if was_repaired else text), was_repaired
