"""What depends on a request runs in processes that can be killed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.errors import Refusal
from serve.sandbox import LARGE, Sandbox, SandboxError


def named(function: str) -> str:
    return f"sandboxed:{function}"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox(workers=1, memory_mib=512)
    yield made
    made.close()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def until(true: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


async def fails(work: Awaitable[Any]) -> Exception:
    with pytest.raises(Exception) as found:  # noqa: PT011
        await work
    return found.value


def test_results_come_back_and_the_process_stays(sandbox: Sandbox) -> None:
    async def run() -> list[Any]:
        return [await sandbox.run(named("echo"), {"a": [1, None]}, deadline_s=5) for _ in range(2)]

    (first, value), (second, _) = asyncio.run(run())
    assert value == {"a": [1, None]} and first == second != os.getpid()


def test_it_outlives_an_event_loop(sandbox: Sandbox) -> None:
    pids = {asyncio.run(sandbox.run(named("echo"), deadline_s=5))[0] for _ in range(2)}
    assert len(pids) == 1


def test_what_the_function_raises_comes_back_as_itself(sandbox: Sandbox) -> None:
    async def run() -> None:
        error = await fails(sandbox.run(named("wrong"), "is none", deadline_s=5))
        assert type(error) is ValueError and str(error) == "is none"
        error = await fails(sandbox.run(named("refuse"), "too large", deadline_s=5))
        assert isinstance(error, Refusal)
        assert (error.status, error.message, error.param, error.retry_after) == (413, "too large", "image", 1.5)
        error = await fails(sandbox.run(named("defect"), "a text of the request", deadline_s=5))
        assert isinstance(error, SandboxError) and "KeyError" in str(error) and "text" not in str(error)

    asyncio.run(run())


def test_what_overruns_is_killed_and_the_next_goes_on(sandbox: Sandbox, tmp_path: Path) -> None:
    async def run() -> None:
        began = time.monotonic()
        assert isinstance(await fails(sandbox.run(named("sleep"), str(tmp_path / "pid"), 60, deadline_s=0.1)),
                          TimeoutError)  # fmt: skip
        assert time.monotonic() - began < 20
        assert (await sandbox.run(named("echo"), 1, deadline_s=5))[1] == 1

    asyncio.run(run())
    assert gone(int((tmp_path / "pid").read_text()))


def test_what_nobody_waits_for_is_killed(sandbox: Sandbox, tmp_path: Path) -> None:
    written = tmp_path / "pid"

    async def run() -> None:
        work = asyncio.create_task(sandbox.run(named("sleep"), str(written), 60, deadline_s=60))
        waiting = asyncio.create_task(sandbox.run(named("sleep"), str(tmp_path / "never"), 60, deadline_s=60))
        while not (written.exists() and written.read_text()):
            await asyncio.sleep(0.01)
        waiting.cancel()
        work.cancel()
        await asyncio.gather(work, waiting, return_exceptions=True)
        assert (await asyncio.wait_for(sandbox.run(named("echo"), 1, deadline_s=5), 20))[1] == 1

    asyncio.run(run())
    assert until(lambda: gone(int(written.read_text()))) and not (tmp_path / "never").exists()


def test_what_takes_too_much_of_a_processor_is_killed(sandbox: Sandbox) -> None:
    async def run() -> None:
        found = await fails(sandbox.run(named("work"), 60, deadline_s=60, processor_s=0.1))
        assert isinstance(found, TimeoutError) and "processor" in str(found)
        assert (await sandbox.run(named("echo"), 1, deadline_s=5, processor_s=5))[1] == 1

    asyncio.run(run())


def test_a_slow_job_makes_room_for_another(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.sandbox.SHORT_S", 0.1)

    async def run() -> None:
        slow = [
            asyncio.create_task(sandbox.run(named("sleep"), str(tmp_path / f"{n}"), 60, deadline_s=60))
            for n in range(3)
        ]
        quick = sandbox.run(named("echo"), 1, deadline_s=5)
        assert (await asyncio.wait_for(quick, 20))[1] == 1
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    asyncio.run(run())


def test_large_jobs_do_not_fill_the_lane_of_small_ones(sandbox: Sandbox, tmp_path: Path) -> None:
    async def run() -> float:
        large = [
            asyncio.ensure_future(
                sandbox.run(named("sleep_over"), str(tmp_path / f"{number}"), 30, b"x" * (LARGE + 1), deadline_s=30)
            )
            for number in range(8)  # more than the lane has threads
        ]
        assert await asyncio.to_thread(until, (tmp_path / "0").exists)
        began = time.monotonic()
        await sandbox.run(named("echo"), 1, deadline_s=10)
        took = time.monotonic() - began
        for each in large:
            each.cancel()
        await asyncio.gather(*large, return_exceptions=True)
        return took

    assert asyncio.run(run()) < 10


def test_a_job_that_works_for_long_gets_a_lower_priority(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.sandbox.SHORT_S", 0.1)

    async def run() -> None:
        normal = os.getpriority(os.PRIO_PROCESS, 0)
        assert await sandbox.run(named("niceness_after"), 1.0, deadline_s=30) == max(normal, 15)
        assert await sandbox.run(named("niceness_after"), 0, deadline_s=30) == normal

    asyncio.run(run())


def test_the_death_of_a_worker_is_told_and_others_go_on(tmp_path: Path) -> None:
    sandbox = Sandbox(workers=2)

    async def run() -> None:
        other = asyncio.create_task(sandbox.run(named("sleep"), str(tmp_path / "pid"), 0.3, deadline_s=20))
        assert isinstance(await fails(sandbox.run(named("die"), deadline_s=5)), SandboxError)
        assert await other == int((tmp_path / "pid").read_text())
        assert (await sandbox.run(named("echo"), 1, deadline_s=5))[1] == 1

    asyncio.run(run())
    sandbox.close()


def test_a_worker_that_died_idle_is_replaced(sandbox: Sandbox) -> None:
    async def run() -> None:
        pid, _ = await sandbox.run(named("echo"), 1, deadline_s=5)
        os.kill(pid, 9)
        assert (await sandbox.run(named("echo"), 2, deadline_s=5))[1] == 2

    asyncio.run(run())


def test_memory_is_bounded(sandbox: Sandbox) -> None:
    async def run() -> None:
        assert "memory" in str(await fails(sandbox.run(named("eat"), 600, deadline_s=5)))
        assert await sandbox.run(named("eat"), 100, deadline_s=5) == 100 << 20

    asyncio.run(run())


def test_a_worker_has_no_heavy_imports_and_no_secrets(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "x")

    async def run() -> None:
        assert await sandbox.run(named("imported"), deadline_s=5) == []
        assert await sandbox.run(named("secrets"), deadline_s=5) == []

    asyncio.run(run())


def test_what_a_function_prints_is_in_no_log(sandbox: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    asyncio.run(sandbox.run(named("speak"), "a text of the request", deadline_s=5))
    assert capfd.readouterr() == ("", "")


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    program = (
        "import asyncio, os\nfrom serve.sandbox import Sandbox\n"
        "print(asyncio.run(Sandbox(1).run('sandboxed:echo', deadline_s=9))[0], flush=True)\nos.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False).stdout
    assert until(lambda: gone(int(said)))
