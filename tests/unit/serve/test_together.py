from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from serve.together import Together


def threaded(work: Callable[[list[int]], Any]) -> Callable[[list[int]], Awaitable[Any]]:
    return lambda calls: asyncio.to_thread(work, calls)


def test_what_comes_during_work_is_worked_on_together_next() -> None:
    batches: list[list[int]] = []
    first_begun, go_on = threading.Event(), threading.Event()

    def work(calls: list[int]) -> Sequence[int]:
        batches.append(calls)
        first_begun.set()
        go_on.wait(10)
        return [call * 10 for call in calls]

    async def run() -> list[int]:
        together: Together[int, int] = Together(threaded(work), most=3)
        asked = [asyncio.create_task(together(0))]
        await asyncio.to_thread(first_begun.wait, 10)
        asked += [asyncio.create_task(together(n)) for n in (1, 2, 3, 4)]
        await asyncio.sleep(0)
        go_on.set()
        return await asyncio.gather(*asked)

    assert asyncio.run(run()) == [0, 10, 20, 30, 40]
    assert batches == [[0], [1, 2, 3], [4]]


def test_a_call_whose_client_has_gone_is_left_out() -> None:
    batches: list[list[int]] = []
    first_begun, go_on = threading.Event(), threading.Event()

    def work(calls: list[int]) -> Sequence[int]:
        batches.append(calls)
        first_begun.set()
        go_on.wait(10)
        return calls

    async def run() -> None:
        together: Together[int, int] = Together(threaded(work), most=8)
        asked = [asyncio.create_task(together(0))]
        await asyncio.to_thread(first_begun.wait, 10)
        asked += [asyncio.create_task(together(n)) for n in (1, 2)]
        await asyncio.sleep(0)
        asked[1].cancel()
        await asyncio.sleep(0)
        go_on.set()
        assert await asked[2] == 2

    asyncio.run(run())
    assert batches == [[0], [2]]


def test_an_error_of_one_is_its_own_and_one_of_all_is_everyones_and_the_next_go_on() -> None:
    def work(calls: list[int]) -> Sequence[int | Exception]:
        if 9 in calls:
            raise RuntimeError("all")
        return [ValueError("one") if call == 1 else call for call in calls]

    async def run() -> None:
        together: Together[int, int] = Together(threaded(work), most=8)
        found = await asyncio.gather(together(0), together(1), return_exceptions=True)
        assert found[0] == 0 and isinstance(found[1], ValueError)
        with pytest.raises(RuntimeError, match="all"):
            await together(9)
        assert await together(3) == 3

    asyncio.run(run())


def test_so_many_batches_are_worked_on_at_once_and_beyond_the_queue_it_is_full() -> None:
    batches: list[list[int]] = []

    async def run() -> None:
        go_on = asyncio.Event()

        async def work(calls: list[int]) -> Sequence[int]:
            batches.append(calls)
            await go_on.wait()
            return calls

        together: Together[int, int] = Together(work, at_once=2, queue=1, most=8)
        asked = []
        for call in range(4):
            assert not (call < 3 and together.full)
            asked.append(asyncio.create_task(together(call)))
            await asyncio.sleep(0.01)
        assert together.full and batches == [[0], [1]]
        go_on.set()
        assert await asyncio.gather(*asked) == [0, 1, 2, 3]
        assert not together.full and not together.running

    asyncio.run(run())
    assert batches == [[0], [1], [2, 3]]


def test_a_batch_is_bounded_by_weight_and_what_weighs_more_goes_alone() -> None:
    batches: list[list[int]] = []

    async def run() -> None:
        async def work(calls: list[int]) -> Sequence[int]:
            batches.append(calls)
            await asyncio.sleep(0)
            return calls

        together: Together[int, int] = Together(work, most=4, weight=lambda call: call, heaviest=10)
        assert await asyncio.gather(*map(together, [1, 4, 6, 1, 20, 9, 1, 0, 0, 0])) == [1, 4, 6, 1, 20, 9, 1, 0, 0, 0]

    asyncio.run(run())
    assert batches == [[1, 0, 0, 0], [4, 1, 1], [6], [20], [9]]


def test_light_calls_pass_heavy_ones_and_the_oldest_is_never_put_off() -> None:
    batches: list[list[int]] = []

    async def run() -> None:
        go_on = asyncio.Event()

        async def work(calls: list[int]) -> Sequence[int]:
            batches.append(calls)
            await go_on.wait()
            return calls

        together: Together[int, int] = Together(work, weight=lambda call: call, heaviest=12)
        asked = []
        for call in (1, 10, 9, 8, 2):
            asked.append(asyncio.create_task(together(call)))
            await asyncio.sleep(0.01)
        go_on.set()
        await asyncio.gather(*asked)

    asyncio.run(run())
    assert batches == [[1], [10, 2], [9], [8]]
