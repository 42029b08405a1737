"""What an answer is worth: one file for each family of verifiable reward, and the pool that runs them.

    similarity             an action against the expert's action: SRL's step reward
    answers                a final answer against the right one: exact, numeric, choice
    expressions            LaTeX and formulas, by math-verify
    structures             JSON: valid, and F1 over its fields, or over a sentence's frames
    orderings              candidates in order: nDCG, reciprocal rank, a label, one pick
    reasoning_gym_scorers  generated problems, by the scorer of their own family
    pool, worker           runs them all in processes that can be killed

A verifier is a function of (text, reference, metadata). It must not know what asked for the text, which
policy wrote it or what its reward is used for; nothing in this room imports ray or torch. Workers import
this module, so heavy imports stand inside the function that needs them; a module that has some offers
`warm_up(metadata)`, which is called before an item's deadline starts.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Collection
from typing import cast

from srl_rlvr.errors import InputError
from srl_rlvr.verifiers.answers import choice, exact, numeric
from srl_rlvr.verifiers.base import Score, Verifier
from srl_rlvr.verifiers.expressions import expression
from srl_rlvr.verifiers.orderings import label, ndcg, pick, reciprocal_rank
from srl_rlvr.verifiers.reasoning_gym_scorers import reasoning_gym
from srl_rlvr.verifiers.similarity import similarity
from srl_rlvr.verifiers.structures import fields, frames

__all__ = ["VERIFIERS", "Score", "Verifier", "check_name", "check_own", "find_verifier"]

VERIFIERS: dict[str, Verifier] = {
    "similarity": similarity,
    "exact": exact,
    "numeric": numeric,
    "choice": choice,
    "expression": expression,
    "reasoning_gym": reasoning_gym,
    "pick": pick,
    "ndcg": ndcg,
    "reciprocal_rank": reciprocal_rank,
    "label": label,
    "fields": fields,
    "frames": frames,
}


_OF_OTHER_TRAINERS = {"completions", "solution_str"}  # parameters of reward functions that are called otherwise


def find_verifier(name: str, own: Collection[str] = ()) -> Verifier:
    """Return the built-in verifier of that name, or the function "package.module:function" if `own` declares it.

    Data never names code: `own` comes from the run file or the command line. Raises InputError with the nearest name,
    or with the fault of the module or the function.
    """
    check_name(name, own)
    return VERIFIERS[name] if name in VERIFIERS else _imported(name)


def check_name(name: str, own: Collection[str] = ()) -> None:
    """Raise InputError if `name` is neither a built-in verifier nor one of the `own` ones. Imports nothing."""
    if name in VERIFIERS or name in own:
        return
    if ":" in name:
        raise InputError(
            f"verifier '{name}' is not declared, and data cannot name code by itself: if you trust it, put "
            f'verifiers = ["{name}"] at the top of the run file, or give eval and predict --verifier {name}'
        )
    nearest = difflib.get_close_matches(name, [*VERIFIERS, *own], n=1, cutoff=0.0)[0]
    raise InputError(
        f"verifier '{name}' is unknown: did you mean '{nearest}'? There are {', '.join([*VERIFIERS, *own])}; "
        "declare your own as 'package.module:function' in the run file's 'verifiers'"
    )


def check_own(names: Collection[str]) -> None:
    """Raise ValueError if a name is not written as "package.module:function"."""
    for name in names:
        module, _, function = name.partition(":")
        if not all(part.isidentifier() for part in [*module.split("."), function]):
            raise ValueError(f"'{name}' should be written as 'package.module:function'")


def _imported(name: str) -> Verifier:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(f"verifier '{name}': {module_name} cannot be imported: {error}") from error
    verifier = getattr(module, function_name, None)
    if not callable(verifier):
        raise InputError(f"verifier '{name}': {module_name} has no function '{function_name}'")
    try:
        signature = inspect.signature(verifier)
        signature.bind("", "", {})
        takes_others = bool(_OF_OTHER_TRAINERS & signature.parameters.keys())
    except TypeError:
        takes_others = True
    except ValueError:  # written in C: its signature is not known
        takes_others = False
    if takes_others:
        raise InputError(
            f"verifier '{name}' is called as {function_name}(text, reference, metadata), with two texts and a dict; "
            "its parameters are others. It should return a Score or a number from 0 to 1"
        )
    return cast(Verifier, verifier)  # what it returns is checked where it is called
