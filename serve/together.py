"""Dynamic batching: calls that come while others are worked on are worked on together next.

Ray Serve's `@serve.batch` needs a replica around it; this runs wherever there is an event loop, in the gateway as in a
replica, never waits for a batch to fill, and leaves out calls whose clients have gone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Call = TypeVar("Call")
Found = TypeVar("Found")


class Together(Generic[Call, Found]):
    """`work` takes at most `most` calls, which weigh at most `heaviest` together unless there is but one, and gives one
    result, or one exception, for each; so many batches `at_once`. It is `full` where that many are at work and `queue`
    calls wait."""

    def __init__(
        self,
        work: Callable[[list[Call]], Awaitable[Sequence[Found | Exception]]],
        at_once: int = 1,
        queue: int = 0,
        most: int = 64,
        weight: Callable[[Call], int] = lambda call: 0,
        heaviest: int = 0,
    ):
        self.work, self.at_once, self.queue, self.most = work, at_once, queue, most
        self.weight, self.heaviest = weight, heaviest
        self.waiting: deque[tuple[Call, asyncio.Future[Found], int]] = deque()
        self.running: set[asyncio.Task[None]] = set()

    @property
    def full(self) -> bool:
        return len(self.running) >= self.at_once and len(self.waiting) >= self.queue

    async def __call__(self, call: Call) -> Found:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((call, future, self.weight(call)))
        if len(self.running) < self.at_once:
            self.running.add(asyncio.create_task(self._run()))
        return await future

    async def _run(self) -> None:
        while self.waiting:
            taken = self._take()
            if taken:
                await self._settle(taken)
        self.running.remove(asyncio.current_task())  # type: ignore[arg-type]

    def _take(self) -> list[tuple[Call, asyncio.Future[Found]]]:
        """The next batch, without calls that nobody waits for: the oldest call, then the lightest, so that heavy ones
        hold up no light ones and are not put off for ever."""
        waiting = [each for each in self.waiting if not each[1].done()]
        taken: list[tuple[Call, asyncio.Future[Found]]] = []
        room = self.heaviest
        for call, future, weight in [*waiting[:1], *sorted(waiting[1:], key=lambda each: each[2])]:
            if len(taken) == self.most or (taken and weight > room):
                break
            taken.append((call, future))
            room -= weight
        chosen = {future for _, future in taken}
        self.waiting = deque(each for each in waiting if each[1] not in chosen)
        return taken

    async def _settle(self, taken: list[tuple[Call, asyncio.Future[Found]]]) -> None:
        found: Sequence[Found | Exception]
        try:
            found = await self.work([call for call, _ in taken])
        except Exception as error:  # whatever it is, those who wait are to know
            found = [error] * len(taken)
        for (_, future), result in zip(taken, found, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
