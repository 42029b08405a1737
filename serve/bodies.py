"""How large a JSON body is inside, told without parsing it: its values and its levels.

Parsing holds the interpreter, and with it every other request, for as long as a body has values. A large body in doubt
is looked into in the sandbox.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.sandbox import Sandbox

LEVELS = 100
_AT_ONCE = 256 * 2**10  # bytes whose texts are found within a few milliseconds
_CHECK_S = 20.0
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\Z)', re.DOTALL)
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


async def check(body: bytes, most_values: int, sandbox: Sandbox) -> None:
    """Raises Refusal (400) for more than so many values, or more than `LEVELS` levels."""
    from serve.errors import Refusal
    from serve.sandbox import SandboxError

    opened = body.count(b"[") + body.count(b"{")
    if opened <= LEVELS and opened + body.count(b",") <= most_values:
        return
    try:
        if len(body) <= _AT_ONCE:
            check_inside(body, most_values)
        else:
            await sandbox.run("serve.bodies:check_inside", body, most_values, deadline_s=_CHECK_S)
    except ValueError as error:
        raise Refusal(400, str(error)) from None
    except (TimeoutError, SandboxError):
        raise Refusal(400, "the body is too complex to read: send less in one request") from None


def check_inside(body: bytes, most_values: int) -> None:
    """Raises ValueError, with a sentence."""
    outside = _TEXT.sub(b"", body)
    values = outside.count(b",") + outside.count(b"[") + outside.count(b"{")
    if values > most_values:
        raise ValueError(f"the body has about {values:,} values; {most_values:,} are the most (limits.values)")
    brackets = outside.translate(None, _NO_BRACKET)
    levels = max(itertools.accumulate(map(_STEP.__getitem__, brackets)), default=0)
    if levels > LEVELS:
        raise ValueError(f"the body is nested too deeply: {levels:,} levels, and {LEVELS} are the most")
