"""What `serving.py` sends, from a process of its own, and the servers that it sends to.

python _serving_load.py '{"address": …, "kinds": {"embeddings": 32}, "seconds": 10}'

So many clients of each kind, each of which asks again when it is answered; prints one JSON line.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORDS = ["river", "stone", "light", "seven", "paper", "early", "garden", "north", "quiet", "music", "window", "bread"]
CHAT_TOKENS = 64
NO_END = {"0": -100, "2": -100}  # the end tokens of SmolLM2, and of the tiny models: answers are of one length
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}


def sentences(count: int, seed: int, words: int = 12) -> list[str]:
    """No two alike: what is encoded once is not to count twice."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words - 1)) + f" {seed}-{number}" for number in range(count)]


def picture(seed: int) -> str:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (64, 64), (seed % 256, 90, 30)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def body(kind: str, seed: int) -> tuple[str, dict[str, Any]]:
    """The path and the body of a request of this kind; `chat:NAME` asks the model of that name."""
    kind, _, model = kind.partition(":")
    [text] = sentences(1, seed)
    messages = [{"role": "user", "content": text}]
    if kind == "chat":
        asked = {"model": model or "task_llm", "messages": messages, "max_tokens": CHAT_TOKENS, "temperature": 0}
        return "chat/completions", asked | {"logit_bias": NO_END}
    if kind == "task_llm":
        return "chat/completions", {"model": "task_llm", "messages": messages, "max_tokens": 24}
    return {
        "embeddings": ("embeddings", {"model": "embeddings", "input": [text]}),
        "passages": ("embeddings", {"model": "embeddings", "input": sentences(1, seed, 100)}),
        "reranker": ("rerank", {"query": text, "documents": sentences(4, seed + 1)}),
        "intent_router": ("route", {"input": text}),
        "srl_parser": ("parse", {"input": f"river {seed} runs"}),
        "extractor": ("extract", {"input": text, "schema": SCHEMA}),
        "multimodal_vision": ("vision", {"image": picture(seed), "question": "what colour is it?"}),
    }[kind]


async def load(address: str, kinds: dict[str, int], seconds: float) -> dict[str, Any]:
    """By kind: the median of milliseconds, answers and tokens a second, and how often each status came."""
    import aiohttp

    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    statuses: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    tokens: Counter[str] = Counter()
    began = time.perf_counter()

    async def client(session: aiohttp.ClientSession, kind: str, number: int) -> None:
        asked = 0
        while time.perf_counter() < began + seconds:
            path, asked_for = body(kind, 1_000_000 * number + asked)
            sent, asked = time.perf_counter(), asked + 1
            try:
                async with session.post(f"{address}/v1/{path}", json=asked_for) as response:
                    answer, status = await response.read(), str(response.status)
            except aiohttp.ClientError as error:
                answer, status = b"", type(error).__name__
            times[kind].append(time.perf_counter() - sent)
            statuses[kind][status] += 1
            if kind.startswith("chat") and status == "200":
                tokens[kind] += json.loads(answer)["usage"]["completion_tokens"]

    async with aiohttp.ClientSession() as session:
        clients = [(kind, number) for kind, count in kinds.items() for number in range(count)]
        await asyncio.gather(*(client(session, kind, number) for kind, number in clients))
    taken = time.perf_counter() - began
    return {
        kind: {
            "ms": 1000 * sorted(of)[len(of) // 2],
            "per_second": len(of) / taken,
            "tokens_per_second": tokens[kind] / taken,
            "statuses": dict(statuses[kind]),
        }
        for kind, of in times.items()
    }


def started(address: str, kinds: dict[str, int], seconds: float) -> subprocess.Popen[str]:
    spec = json.dumps({"address": address, "kinds": kinds, "seconds": seconds})
    return subprocess.Popen([sys.executable, __file__, spec], stdout=subprocess.PIPE, text=True)


def sent(address: str, kind: str, at_once: int, seconds: float) -> dict[str, Any]:
    """Of one kind; see `all_sent`."""
    return all_sent(address, {kind: at_once}, seconds)[kind]


def all_sent(address: str, kinds: dict[str, int], seconds: float) -> dict[str, dict[str, Any]]:
    """Ends with exit 1 where a request is not answered with 200."""
    out, _ = started(address, kinds, seconds).communicate()
    found = json.loads(out)
    for kind, of in found.items():
        if set(of["statuses"]) != {"200"}:
            raise SystemExit(f"error: {address} answered {kind} with {of['statuses']}")
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def server(command: Sequence[str], port: int, ready: str, folder: Path, environment: Any = None) -> Iterator[Any]:
    """The process of a command that listens at this port, once `ready` can be read there; its output is in `folder`."""
    import httpx2

    with (folder / f"{port}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + 400
        while True:
            try:
                if httpx2.get(f"http://127.0.0.1:{port}{ready}", timeout=20).status_code == 200:
                    break
            except httpx2.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(
                    f"error: {' '.join(command)}: not ready\n{(folder / f'{port}.log').read_text()[-2000:]}"
                )
            time.sleep(0.5)
        yield process
    finally:
        process.terminate()
        process.wait(90)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(**json.loads(sys.argv[1])))))
