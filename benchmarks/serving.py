"""What the gateway and Ray Serve cost, and how they stand a load.

    python benchmarks/serving.py                     all parts: about 20 minutes
    python benchmarks/serving.py --quick             all parts, short, with tiny models
    python benchmarks/serving.py --only embeddings   a part: embeddings, chat, shared or soak
    python benchmarks/serving.py --infinity COMMAND  infinity-emb's own, of an environment of its own, as the peer

**embeddings**: all-MiniLM-L6-v2, against the same encoder in this process and against a plain FastAPI server on
sentence-transformers (`_plain_server.py`). `embeddings_added_ms`: one request of one sentence of 12 words at a time,
less the sentence in this process. 32 requests at a time, of one text each: `embeddings_throughput_ratio` is texts a
second over those of this process encoding 32 together, and `vs_peer_server` over the peer's, for sentences;
`passages_…` the same for passages of 100 words.

**chat**: SmolLM2-135M-Instruct, 8 chats of 64 tokens at a time: tokens a second over those of vLLM's own server
(`vllm serve`, started by its module) with the same settings.

**shared**: three models with adapters of rank 16 on SmolLM2-135M-Instruct, two chats with each at a time, on one base
(`base`), against each merged in an engine of its own, on its part of the cores. `shared_vs_apart` is tokens a second,
`shared_gib` and `apart_gib` what the processes hold.

**soak**: seven models, one of each type, one client of each at once for ten minutes. Halfway a new champion of the
embedder is registered. `soak_errors` are requests without an answer or with a status of 500 and above in all that
time, `upgrade_failed_requests` those of the embedder that were not 200. An answer that does not fit (422: the models
are untrained) is no error of the server; all statuses are printed. Memory is the sum of what the processes hold.

All sides have all cores, and one works at a time; requests are sent by a process of their own, on the same cores.
Medians of rounds, the sides in turn. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _serving_load as loads
import adapters
import psutil
from _machine import MODEL, in_the_actors_environment, of_tests, tell
from _machine import model as base_model

HERE = Path(__file__).parent
ENCODER = "all-minilm-l6-v2"
AT_ONCE, CHATS = 32, 8
TAKEN_OVER = "the new version has taken over"
Rounds = dict[str, list[dict[str, float]]]  # by side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=tuple(PARTS))
    parser.add_argument("--infinity", metavar="COMMAND", default="")
    options = parser.parse_args()
    in_the_actors_environment(options.quick)
    figures: dict[str, float] = {}
    for part in [options.only] if options.only else PARTS:
        with tempfile.TemporaryDirectory() as folder:
            figures |= PARTS[part](Path(folder), options)
    tell("serving", figures, whole=not (options.quick or options.only))


def embeddings(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    model = placed(folder, "embeddings", encoder_of(folder, options.quick), max_context=128)
    encoder = in_this_process(model)
    rounds, seconds = (1, 2.0) if options.quick else (5, 8.0)
    sides = {
        "gateway": ours(model),
        "plain": Side([sys.executable, str(HERE / "_plain_server.py"), str(model)], "/docs"),
    }
    if options.infinity:
        theirs = [options.infinity, "v2", "--model-id", str(model), "--served-model-name", "embeddings", "--engine"]
        theirs += ["torch", "--device", "cpu", "--no-bettertransformer", "--url-prefix", "/v1", "--port"]
        sides["infinity"] = Side(theirs, "/v1/models")
    asked = {"ms": ("embeddings", 1), "sentences": ("embeddings", AT_ONCE), "passages": ("passages", AT_ONCE)}
    found: Rounds = {side: [] for side in ("in_process", *sides)}
    with running(sides, folder, "embeddings") as (addresses, _):
        for _ in range(rounds):
            found["in_process"].append(encoded(encoder, seconds))
            for side, at in addresses.items():
                rates = {what: loads.sent(at, kind, count, seconds) for what, (kind, count) in asked.items()}
                found[side].append({what: of["ms" if what == "ms" else "per_second"] for what, of in rates.items()})
    median = {
        side: {what: statistics.median(each[what] for each in of) for what in asked} for side, of in found.items()
    }
    print(f"{'side':<12}{'ms, one at a time':>18}{'sentences/s, 32':>18}{'passages/s, 32':>18}   rounds of sentences")
    for side, of in median.items():
        each = " ".join(f"{one['sentences']:.0f}" for one in found[side])
        print(f"{side:<12}{of['ms']:>18.1f}{of['sentences']:>18.0f}{of['passages']:>18.1f}   {each}")
    gateway, alone, peer = median["gateway"], median["in_process"], median.get("infinity", median["plain"])
    return {
        "embeddings_added_ms": round(gateway["ms"] - alone["ms"], 2),
        "embeddings_throughput_ratio": round(gateway["sentences"] / alone["sentences"], 3),
        "passages_throughput_ratio": round(gateway["passages"] / alone["passages"], 3),
        "vs_peer_server": round(gateway["sentences"] / peer["sentences"], 3),
        "passages_vs_peer_server": round(gateway["passages"] / peer["passages"], 3),
    }


def chat(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    model = placed(folder, "task_llm", base_model(options.quick), max_context=512)
    rounds, seconds = (1, 5.0) if options.quick else (5, 15.0)
    theirs = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name"]
    theirs += ["task_llm", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager"]
    theirs += ["--kv-cache-memory-bytes", str(2**29), "--disable-log-stats", "--port"]
    sides = {"gateway": ours(model), "vllm": Side(theirs, "/health")}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    with running(sides, folder, "chat") as (addresses, _):
        for _ in range(rounds):
            for side, at in addresses.items():
                rates[side].append(loads.sent(at, "chat", CHATS, seconds)["tokens_per_second"])
    for side, of in rates.items():
        print(f"{side:<12}{statistics.median(of):>8.0f} tokens/s, {CHATS} chats   {' '.join(f'{r:.0f}' for r in of)}")
    return {"chat_vs_vllm": round(statistics.median(rates["gateway"]) / statistics.median(rates["vllm"]), 3)}


def shared(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    base = base_model(options.quick)
    models = [with_adapters(folder / name, base, seed) for seed, name in enumerate(("first", "second", "third"))]
    sides = {}
    for side, line in (("shared", f'base = "{base}"\n'), ("apart", "")):
        text = "".join(f'[[models]]\npath = "{model}"\n{line}' for model in models)
        (folder / f"{side}.toml").write_text(text)
        command = [sys.executable, "-m", "srl_rlvr", "serve", str(folder / f"{side}.toml"), "--port"]
        sides[side] = Side(command, "/readyz")
    rounds, seconds = (1, 5.0) if options.quick else (3, 20.0)
    kinds = {f"chat:{model.name}": 2 for model in models}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    with running(sides, folder, f"chat:{models[0].name}") as (addresses, processes):
        for _ in range(rounds):
            for side, at in addresses.items():
                found = loads.all_sent(at, kinds, seconds)
                rates[side].append(sum(of["tokens_per_second"] for of in found.values()))
        held = {side: memory(psutil.Process(process.pid)) for side, process in processes.items()}
    for side, of in rates.items():
        each = " ".join(f"{rate:.0f}" for rate in of)
        print(f"{side:<12}{statistics.median(of):>8.0f} tokens/s, 3 models of 2 chats   {each}   {held[side]:.2f} GiB")
    return {
        "shared_vs_apart": round(statistics.median(rates["shared"]) / statistics.median(rates["apart"]), 3),
        "shared_gib": round(held["shared"], 2),
        "apart_gib": round(held["apart"], 2),
    }


def soak(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    import mlflow

    minutes, requests = (0.5, 10) if options.quick else (10.0, 100)
    models = seven(folder, options.quick)
    newer = shutil.copytree(models["embeddings"], folder / "newer")
    (folder / "out").mkdir()
    registry = mlflow.MlflowClient(f"sqlite:///{folder}/out/mlflow.db")
    registry.create_registered_model("embeddings")

    def champion(model: Path) -> None:
        version = registry.create_model_version("embeddings", model.as_uri(), await_creation_for=0)
        registry.set_registered_model_alias("embeddings", "champion", version.version)

    champion(models.pop("embeddings"))
    port = loads.free_port()
    text = f"port = {port}\n[upgrade]\nshare = 0.2\nrequests = {requests}\nslower = 4\nregistry_every_s = 2\n"
    text += '[[models]]\npath = "registry:embeddings"\nthreads = 1\n'
    text += "".join(f'[[models]]\npath = "{model}"\nthreads = 1\nkv_cache_gib = 0.2\n' for model in models.values())
    (folder / "serve.toml").write_text(text)
    command = [sys.executable, "-m", "srl_rlvr", "serve", "serve.toml"]
    with loads.server(command, port, "/readyz", folder) as process:
        sending = loads.started(f"http://127.0.0.1:{port}", dict.fromkeys(("embeddings", *models), 1), 60 * minutes)
        halfway: float | None = time.monotonic() + 30 * minutes
        held = []
        while sending.poll() is None:
            if halfway and time.monotonic() > halfway:
                champion(newer)
                halfway = None
            held.append(memory(psutil.Process(process.pid)))
            time.sleep(3)
        out, _ = sending.communicate()
        late, said = time.monotonic() + 120, ""
        while TAKEN_OVER not in said and time.monotonic() < late:  # a short load may end before the upgrade
            time.sleep(1)
            said = (folder / f"{port}.log").read_text()
    print("\n".join(line for line in said.splitlines() if line.startswith("embeddings:")))
    found = json.loads(out)
    print(f"{'type':<20}{'ms':>8}{'a second':>10}   statuses")
    for kind, of in found.items():
        print(f"{kind:<20}{of['ms']:>8.0f}{of['per_second']:>10.1f}   {of['statuses']}")
    fifth = max(1, len(held) // 5)
    parts = [statistics.median(held[start : start + fifth]) for start in range(0, fifth * 5, fifth)]
    print(f"GiB, fifths of the time: {' '.join(f'{part:.2f}' for part in parts)}; at most {max(held):.2f}")
    if TAKEN_OVER not in said:
        raise SystemExit("error: the new version did not take over")
    statuses = [item for of in found.values() for item in of["statuses"].items()]
    return {
        "soak_errors": sum(count for status, count in statuses if status not in ("200", "422")),
        "upgrade_failed_requests": sum(n for status, n in found["embeddings"]["statuses"].items() if status != "200"),
        "soak_peak_gib": round(max(held), 2),
    }


@dataclass(frozen=True)
class Side:
    """A server: its command but for the port, which comes last, and what can be read there once it is ready."""

    command: list[str]
    ready: str


def ours(model: Path) -> Side:
    return Side([sys.executable, "-m", "srl_rlvr", "serve", "--model", str(model), "--port"], "/readyz")


@contextmanager
def running(sides: dict[str, Side], folder: Path, kind: str) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """The address and the process of each, all of them warm."""
    from srl_rlvr.engines import vllm_engine

    environment = {**os.environ, **vllm_engine.ENVIRONMENT, "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    addresses, processes = {}, {}
    with ExitStack() as servers:
        for name, side in sides.items():
            port = loads.free_port()
            addresses[name] = f"http://127.0.0.1:{port}"
            started = loads.server([*side.command, str(port)], port, side.ready, folder, environment)
            processes[name] = servers.enter_context(started)
            loads.sent(addresses[name], kind, CHATS, 2.0)
        yield addresses, processes


def encoder_of(folder: Path, quick: bool, plain: bool = False) -> Path:
    """The encoder's folder, or that of a tiny one if the run is quick; `plain` is the one without its pooling."""
    from srl_rlvr.cli.session import model_cache
    from srl_rlvr.policies import base_models

    if not quick:
        return base_models.resolve(ENCODER, model_cache())
    tiny = folder / "tiny"
    if not tiny.is_dir():
        of_tests("tiny_encoder").write(tiny)
    return tiny.with_name("tiny-bert") if plain else tiny


def placed(folder: Path, model_type: str, base: Path, **card: Any) -> Path:
    """The base as a trained model of this type."""
    model = folder / model_type
    shutil.copytree(base, model, dirs_exist_ok=True)
    (model / "model_card.json").write_text(json.dumps({"name": model_type, "model_type": model_type, **card}))
    return model


def with_adapters(model: Path, base: Path, seed: int) -> Path:
    """A model as training with LoRA leaves it: merged, and its adapters beside the weights."""
    shutil.copytree(base, model)
    adapters.adapted(base, 16, seed).save_model(model, {"name": model.name, "base": MODEL, "max_context": 512})
    return model


def seven(folder: Path, quick: bool) -> dict[str, Path]:
    """A model of each type, untrained."""
    from sentence_transformers import CrossEncoder

    from srl_rlvr import vision_base

    labels = {f"label {number}": text for number, text in enumerate(loads.sentences(20, 7, 6))}
    encoder, cross = encoder_of(folder, quick), encoder_of(folder, quick, plain=True)
    CrossEncoder(str(cross), num_labels=1, device="cpu").save_pretrained(str(folder / "cross"))
    vision_base.build(folder / "eyes", texts=["what colour is it? red green blue yes no"])
    writer: dict[str, Any] = {"max_context": 512, "max_tokens": 24}
    made = {
        "embeddings": placed(folder, "embeddings", encoder, max_context=128),
        "intent_router": placed(folder, "intent_router", encoder, max_context=128, labels=labels),
        "reranker": placed(folder, "reranker", folder / "cross", max_context=128),
        "multimodal_vision": placed(folder, "multimodal_vision", folder / "eyes", max_context=256, max_tokens=8),
    }
    return made | {
        name: placed(folder, name, base_model(quick), **writer) for name in ("task_llm", "srl_parser", "extractor")
    }


def in_this_process(model: Path) -> Any:
    """What the replica does with texts, without a server around it."""
    from serve.config import ModelEntry
    from serve.replicas import Encoder

    encoder = Encoder(ModelEntry(path=str(model), name="embeddings"))
    return lambda texts: encoder.encode_now(encoder.tokenize(*((text,) for text in texts)))


def encoded(encoder: Any, seconds: float) -> dict[str, float]:
    times, seed = [], 0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began, seed = time.perf_counter(), seed + 1
        encoder(loads.sentences(1, seed))
        times.append(time.perf_counter() - began)
    found = {"ms": 1000 * statistics.median(times)}
    for what, words in (("sentences", 12), ("passages", 100)):
        count, began = 0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            encoder(loads.sentences(AT_ONCE, seed := seed + 1, words))
            count += AT_ONCE
        found[what] = count / (time.perf_counter() - began)
    return found


def memory(process: Any) -> float:
    """GiB that it and what it started hold, shared pages divided among their holders."""
    held = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            held += each.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return held / 2**30


PARTS: dict[str, Any] = {"embeddings": embeddings, "chat": chat, "shared": shared, "soak": soak}

if __name__ == "__main__":
    main()
