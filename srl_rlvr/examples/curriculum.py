"""Which problem comes next: every problem in turn, or those of the levels from which the policy can learn most.

A `Selector` names rows of a stage's prompts and is told what they earned. It must not know what a prompt says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from srl_rlvr.seeds import derived_seed

_DISCOUNT = 0.8  # of what an arm earned, each time that something newer is known of it: the policy moves on


def levels(examples: pa.Table) -> list[str]:
    """Of each `Example`: its task, the params that it was generated with, and how many steps its solution has."""
    columns = (examples[name].to_pylist() for name in ("task", "provenance", "difficulty"))
    return [
        f"{task} {json.dumps(json.loads(provenance).get('params', {}))}, level {difficulty:g}"
        for task, provenance, difficulty in zip(*columns, strict=True)
    ]


class Selector(Protocol):
    """`state` is all that a resumed run needs to go on as if it had not been interrupted; it holds JSON values."""

    state: dict[str, Any]

    def take(self, count: int) -> list[int]:
        """The next rows, at most `count`, none twice if not asked for; those of one trunk together and in order."""
        ...

    def learn(self, earned: Sequence[tuple[int, Sequence[float]]]) -> None:
        """What the samples of some rows earned: (row, rewards), each at most 1."""
        ...


class Order:
    """An endless, seeded stream of row numbers: each epoch visits every trunk once, its rows together and in order.

    A position in the stream is one number, so a resumed run goes on exactly where it stopped.
    """

    def __init__(self, trunk_ids: Sequence[str], seed: int, label: str):
        rows_of: dict[str, list[int]] = {}
        for row, trunk_id in enumerate(trunk_ids):
            rows_of.setdefault(trunk_id, []).append(row)
        self._trunks = list(rows_of.values())
        self._rows = len(trunk_ids)
        self._seed, self._label = seed, label
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, cursor: int, count: int) -> list[int]:
        """The next `count` rows, at most an epoch's worth; a row that would come twice ends the batch early."""
        taken: list[int] = []
        seen: set[int] = set()
        while len(taken) < count:
            row = self.at(cursor + len(taken))
            if row in seen:
                break
            seen.add(row)
            taken.append(row)
        return taken

    def at(self, position: int) -> int:
        epoch, index = divmod(position, self._rows)
        if epoch != self._epoch:
            rng = np.random.default_rng(derived_seed(self._seed, self._label, epoch))
            self._order = np.concatenate([self._trunks[i] for i in rng.permutation(len(self._trunks))])
            self._epoch = epoch
        return int(self._order[index])


class Uniform:
    """An epoch visits every problem once. With `repeats` a batch is whole, however few problems there are."""

    def __init__(self, trunk_ids: Sequence[str], seed: int, label: str, state: dict[str, Any], repeats: bool = False):
        self._order = Order(trunk_ids, seed, label)
        self._repeats = repeats
        self.state = state
        state.setdefault("cursor", 0)

    def take(self, count: int) -> list[int]:
        cursor = self.state["cursor"]
        whole = range(cursor, cursor + count)
        rows = [self._order.at(place) for place in whole] if self._repeats else self._order.take(cursor, count)
        self.state["cursor"] += len(rows)
        return rows

    def learn(self, earned: Sequence[tuple[int, Sequence[float]]]) -> None: ...


class Informative:
    """Problems of the arms (`levels`) where samples of one problem differ most: its pass rate is near one half.

    That is not asked of the arm's pass rate: where half of its problems are always solved and half never, no group has
    a signal. Each pair of samples of a problem differs or is alike (graded rewards: by how much), with chance
    2p(1 - p) where the problem is solved with chance p. Thompson sampling: each problem's arm is the one with the
    largest such chance, drawn from the arm's Beta posterior over discounted pairs. So an arm of which little is known
    is tried, and one that is solved or hopeless comes back now and then. Within an arm, problems come in turn.
    """

    def __init__(self, trunk_ids: Sequence[str], arms: Sequence[str], seed: int, label: str, state: dict[str, Any]):
        rows_of: dict[str, list[int]] = {}
        for row, arm in enumerate(arms):
            rows_of.setdefault(arm, []).append(row)
        self._trunk_ids, self._arms, self._seed, self._label = trunk_ids, arms, seed, label
        self._rows = rows_of
        self._orders = {
            arm: Order([trunk_ids[row] for row in rows], seed, f"{label}/{arm}") for arm, rows in rows_of.items()
        }
        self.state = state
        state.setdefault("drawn", 0)
        state.setdefault("arms", {arm: {"cursor": 0, "differ": 0.0, "alike": 0.0} for arm in rows_of})

    def take(self, count: int) -> list[int]:
        rng = np.random.default_rng(derived_seed(self._seed, self._label, "curriculum", self.state["drawn"]))
        self.state["drawn"] += 1
        taken: list[int] = []
        open_arms = list(self._orders)
        while len(taken) < count and open_arms:
            arm = max(open_arms, key=lambda arm: self._value(arm, rng))
            if not self._take_trunk(arm, count, taken):
                open_arms.remove(arm)
        return taken

    def learn(self, earned: Sequence[tuple[int, Sequence[float]]]) -> None:
        of_arm: dict[str, list[tuple[float, float]]] = {}
        for row, rewards in earned:
            pairs = list(combinations(np.clip(rewards, 0.0, 1.0).tolist(), 2))
            if pairs:
                share = sum(abs(a - b) for a, b in pairs) / len(pairs)
                apart = len(rewards) / 2  # pairs that have no sample in common
                of_arm.setdefault(self._arms[row], []).append((share * apart, (1 - share) * apart))
        for arm, counts in of_arm.items():
            known = self.state["arms"][arm]
            differ, alike = map(sum, zip(*counts, strict=True))
            known["differ"] = _DISCOUNT * known["differ"] + differ
            known["alike"] = _DISCOUNT * known["alike"] + alike

    def _value(self, arm: str, rng: np.random.Generator) -> float:
        known = self.state["arms"][arm]
        return rng.beta(0.5 + known["differ"], 0.5 + known["alike"])  # Jeffreys' prior

    def _take_trunk(self, arm: str, count: int, taken: list[int]) -> bool:
        """What is left of the arm's next trunk, as far as `count` allows; False where it is in the batch already."""
        known, rows, order = self.state["arms"][arm], self._rows[arm], self._orders[arm]
        trunk = None
        while len(taken) < count:
            row = rows[order.at(known["cursor"])]
            if row in taken or trunk not in (None, self._trunk_ids[row]):
                break
            trunk = self._trunk_ids[row]
            taken.append(row)
            known["cursor"] += 1
        return trunk is not None
