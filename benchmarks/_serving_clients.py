"""What `serving_attack.py` and `serving_faults.py` share: ordinary clients of all endpoints, the server they ask."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _serving_load as loads
import aiohttp
import psutil
from _machine import of_tests

KINDS = {  # of requests, by endpoint: what `_serving_load` names them by
    "chat": "task_llm",
    "stream": "task_llm",
    "embeddings": "embeddings",
    "rerank": "reranker",
    "route": "intent_router",
    "extract": "extractor",
    "parse": "srl_parser",
    "vision": "multimodal_vision",
}
MAY_NOT_FIT = ("extract", "parse")  # 422: the answer of an untrained model does not have the form
CLIENT_S = 130  # longer than the server's own deadline


@dataclass(frozen=True)
class Asked:
    """A request that has ended; times are of `time.monotonic`."""

    kind: str
    began: float
    ended: float
    status: str  # a code, or what happened in place of one
    note: str

    @property
    def failed(self) -> bool:
        return self.status != "200" and not (self.status == "422" and self.kind in MAY_NOT_FIT)


class Clients:
    """`count` clients that each ask one endpoint again and again, from a thread of this process."""

    def __init__(self, address: str, kinds: Sequence[str], count: int):
        self.address, self.kinds, self.count = address, kinds, count
        self.asked: list[Asked] = []
        self._stop, self._grace_s = threading.Event(), 0.0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), daemon=True)

    def start(self) -> Clients:
        self._thread.start()
        return self

    def stop(self, grace_s: float) -> list[Asked]:
        """Return all requests. Those under way are given `grace_s` and count as unanswered afterwards."""
        self._grace_s = grace_s
        self._stop.set()
        self._thread.join()
        return self.asked

    async def _all(self) -> None:
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=CLIENT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            kinds = [self.kinds[number % len(self.kinds)] for number in range(self.count)]
            clients = [asyncio.create_task(self._client(session, kind, n)) for n, kind in enumerate(kinds)]
            while not self._stop.is_set():
                await asyncio.sleep(0.05)
            _, late = await asyncio.wait(clients, timeout=self._grace_s)
            for client in late:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)

    async def _client(self, session: aiohttp.ClientSession, kind: str, number: int) -> None:
        turn = 0
        while not self._stop.is_set():
            path, body = loads.body(KINDS[kind], 1_000_000 * number + turn)
            turn += 1
            if kind == "stream":
                body |= {"stream": True, "logit_bias": loads.NO_END}
            began, status, note = time.monotonic(), "unanswered", ""
            try:
                status, note = await self._ask(session, f"{self.address}/v1/{path}", body, kind)
            finally:
                self.asked.append(Asked(kind, began, time.monotonic(), status, note))
            if self.asked[-1].failed:
                await asyncio.sleep(0.3)

    async def _ask(self, session: aiohttp.ClientSession, url: str, body: dict[str, Any], kind: str) -> tuple[str, str]:
        try:
            async with session.post(url, json=body) as response:
                answer = (await response.read()).decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError) as error:
            return type(error).__name__, str(error)[:100]
        if kind == "stream" and response.status == 200 and "[DONE]" not in answer:
            return "broken stream", answer[-100:]
        return str(response.status), "" if response.status == 200 else answer[:140]


def models(folder: Path) -> dict[str, Path]:
    """The tests' tiny untrained models, one of each type, by type."""
    served, encoder, writer = map(of_tests, ("served_models", "tiny_encoder", "tiny_model"))
    return served.write(folder / "models", writer.write(folder / "writer"), encoder.write(folder / "encoder"))


@dataclass
class Server:
    """`srl-rlvr serve` as a process."""

    address: str
    process: psutil.Popen
    log: Path

    def ready(self) -> bool:
        import httpx2

        try:
            return httpx2.get(f"{self.address}/readyz", timeout=5).status_code == 200
        except httpx2.HTTPError:
            return False

    def ready_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            if self.ready():
                return True
            time.sleep(0.5)
        return False

    def processes(self) -> list[psutil.Process]:
        """Those that the command has started, and theirs."""
        try:
            return self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@contextmanager
def serving(folder: Path, paths: dict[str, Path], engine: str) -> Iterator[Server]:
    """The server of these models, ready; on leaving, nothing of it stays. Ends with exit 1 if it does not start."""
    port = loads.free_port()
    lines = [f"port = {port}"]
    for path in paths.values():
        lines.append(f'[[models]]\npath = "{path}"\nkv_cache_gib = 0.2\nmax_tokens = 400\nengine = "{engine}"')
    (folder / "serve.toml").write_text("\n".join(lines) + "\n")
    log = folder / f"{port}.log"
    command = [sys.executable, "-m", "srl_rlvr", "serve", "serve.toml"]
    environment = {**os.environ, "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        process = psutil.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=environment)
    server, began = Server(f"http://127.0.0.1:{port}", process, log), time.monotonic()
    try:
        if not server.ready_within(400):
            raise SystemExit(f"error: the server is not ready after {time.monotonic() - began:.0f} s\n{tail(log)}")
        print(f"ready after {time.monotonic() - began:.0f} s", file=sys.stderr)
        yield server
    finally:
        mine = server.processes()
        if process.poll() is None:
            process.terminate()
        _, late = psutil.wait_procs([process, *mine], timeout=60)
        end(late)


def end(processes: Sequence[psutil.Process]) -> None:
    for each in processes:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def command_line(process: psutil.Process) -> str:
    """Empty if it has ended."""
    try:
        return " ".join(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.NoSuchProcess:
        return ""


def statuses(asked: Sequence[Asked]) -> dict[str, int]:
    return dict(Counter(each.status for each in asked).most_common())


def print_failures(asked: Sequence[Asked]) -> None:
    """To standard error, the commonest first."""
    for (kind, status, note), count in Counter((a.kind, a.status, a.note) for a in asked if a.failed).most_common(8):
        print(f"  {count:>5} {kind}: {status} {note}", file=sys.stderr)
