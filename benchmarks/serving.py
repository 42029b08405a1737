"""What the gateway and Ray Serve cost over the model alone, and how a plain server does.

    python benchmarks/serving.py            five rounds, the sides in turn
    python benchmarks/serving.py --quick    one short round: it works

all-MiniLM-L6-v2, sentences of 12 words. One request at a time, one sentence each: `embeddings_added_ms` is the median
of requests less that of the same sentence in this process. 32 requests at a time: `embeddings_throughput_ratio` is
sentences a second over those of this process encoding 32 together, and `vs_peer_server` over those of a plain FastAPI
server on sentence-transformers (`_plain_server.py`). Medians of the rounds. All sides have all cores, and one works at
a time; requests are sent by a process of their own, on the same cores.
Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _machine import commit, in_the_actors_environment, machine

HERE = Path(__file__).parent
MODEL = "all-minilm-l6-v2"
AT_ONCE = 32
SIDES = ("in_process", "gateway", "plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        address, at_once, seconds = options.load
        print(json.dumps(asyncio.run(_load(address, int(at_once), float(seconds)))))
        return
    in_the_actors_environment()
    rounds, seconds = (1, 2.0) if options.quick else (5, 10.0)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        model = _model(Path(folder))
        ports = _free_port(), _free_port()
        command = [sys.executable, "-m", "srl_rlvr", "serve", "--model", str(model), "--port", str(ports[0])]
        servers = {
            "gateway": subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL),
            "plain": subprocess.Popen([sys.executable, str(HERE / "_plain_server.py"), str(model), str(ports[1])]),
        }
        addresses = dict(zip(servers, (f"http://127.0.0.1:{port}" for port in ports), strict=True))
        try:
            encoder = _encoder(model)
            for side, address in addresses.items():
                _wait_for(address, servers[side])
                _sent(address, AT_ONCE, 2.0)  # warm
            for _ in range(rounds):
                for side in SIDES:
                    if side == "in_process":
                        found[side].append(_in_process(encoder, seconds))
                    else:
                        one, many = (_sent(addresses[side], at_once, seconds) for at_once in (1, AT_ONCE))
                        found[side].append({"ms": one["ms"], "per_second": many["per_second"]})
        finally:
            for server in servers.values():
                server.terminate()
            for server in servers.values():
                server.wait(60)
    _report(found)


def _report(found: dict[str, list[dict[str, float]]]) -> None:
    median = {
        side: {name: statistics.median(of[name] for of in rounds) for name in ("ms", "per_second")}
        for side, rounds in found.items()
    }
    print(f"{'side':<12}{'ms, one at a time':>18}{'sentences/s, 32 at a time':>28}   all")
    for side, of in median.items():
        rates = " ".join(f"{each['per_second']:.0f}" for each in found[side])
        print(f"{side:<12}{of['ms']:>18.1f}{of['per_second']:>28.0f}   {rates}")
    ours = median["gateway"]
    figures = {
        "embeddings_added_ms": round(ours["ms"] - median["in_process"]["ms"], 2),
        "embeddings_throughput_ratio": round(ours["per_second"] / median["in_process"]["per_second"], 3),
        "vs_peer_server": round(ours["per_second"] / median["plain"]["per_second"], 3),
    }
    print(json.dumps({"benchmark": "serving", "figures": figures, "machine": machine(), "commit": commit()}))


def _sentences(count: int, seed: int) -> list[str]:
    """No two alike: what is encoded once is not to count twice."""
    words = [
        "river",
        "stone",
        "light",
        "seven",
        "paper",
        "early",
        "garden",
        "north",
        "quiet",
        "music",
        "window",
        "bread",
    ]
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=11)) + f" {seed}-{number}" for number in range(count)]


def _in_process(encoder: Any, seconds: float) -> dict[str, float]:
    times, seed = [], 0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began, seed = time.perf_counter(), seed + 1
        encoder(_sentences(1, seed))
        times.append(time.perf_counter() - began)
    count, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        encoder(_sentences(AT_ONCE, seed := seed + 1))
        count += AT_ONCE
    return {"ms": 1000 * statistics.median(times), "per_second": count / (time.perf_counter() - began)}


async def _load(address: str, at_once: int, seconds: float) -> dict[str, float]:
    """So many clients, each of which asks again when it is answered."""
    import aiohttp

    times: list[float] = []
    until = time.perf_counter() + seconds

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        asked = 0
        while time.perf_counter() < until:
            body = {"model": "embedder", "input": _sentences(1, 1_000_000 * number + asked)}
            began, asked = time.perf_counter(), asked + 1
            async with session.post(f"{address}/v1/embeddings", json=body) as response:
                response.raise_for_status()
                await response.read()
            times.append(time.perf_counter() - began)

    began = time.perf_counter()
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session, number) for number in range(at_once)))
    return {"ms": 1000 * statistics.median(times), "per_second": len(times) / (time.perf_counter() - began)}


def _sent(address: str, at_once: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--load", address, str(at_once), str(seconds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _model(folder: Path) -> Path:
    """The base as a trained embedder."""
    import shutil

    from srl_rlvr.cli.session import model_cache
    from srl_rlvr.policies import base_models

    model = shutil.copytree(base_models.resolve(MODEL, model_cache()), folder / "embedder")
    card = {"name": "embedder", "model_type": "embeddings", "max_context": 128}
    (model / "model_card.json").write_text(json.dumps(card))
    return model


def _encoder(model: Path) -> Any:
    """What the replica does with texts, without a server around it."""
    from serve.config import ModelEntry
    from serve.replicas import Encoder

    encoder = Encoder(ModelEntry(path=str(model), name="embedder"))
    return lambda texts: encoder.encode_now(encoder.tokenize(*((text,) for text in texts)))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    import httpx2

    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and server.poll() is None:
        try:
            httpx2.post(f"{address}/v1/embeddings", json={"model": "embedder", "input": ["a"]}).raise_for_status()
            return
        except httpx2.HTTPError:
            time.sleep(0.5)
    raise SystemExit(f"error: {address} did not answer within 240 s")


if __name__ == "__main__":
    main()
