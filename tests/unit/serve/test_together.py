from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from serve.together import Together


def test_what_comes_during_work_is_worked_on_together_next() -> None:
    batches: list[list[int]] = []
    first_begun, go_on = threading.Event(), threading.Event()

    def work(calls: list[int]) -> Sequence[int]:
        batches.append(calls)
        first_begun.set()
        go_on.wait(10)
        return [call * 10 for call in calls]

    async def run() -> list[int]:
        together: Together[int, int] = Together(work, most=3)
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
        together: Together[int, int] = Together(work, most=8)
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
        together: Together[int, int] = Together(work, most=8)
        found = await asyncio.gather(together(0), together(1), return_exceptions=True)
        assert found[0] == 0 and isinstance(found[1], ValueError)
        with pytest.raises(RuntimeError, match="all"):
            await together(9)
        assert await together(3) == 3

    asyncio.run(run())
