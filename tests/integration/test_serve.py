"""`srl-rlvr serve` as users start it: Ray, vLLM, our engine and an encoder, and the official client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import served_models
from cli_runs import srl_rlvr

from srl_rlvr.client import ApiError, Client

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "old": {"type": "boolean"}},
    "required": ["city", "old"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_encoder: Path) -> dict[str, Path]:
    return served_models.write(tmp_path_factory.mktemp("served"), tiny_model, tiny_encoder)


@pytest.fixture(scope="module")
def gateway(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Its address and its process, which the last test ends."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    models = "".join(
        f'[[models]]\npath = "{folders[name]}"\nmax_tokens = 60\n' for name in ("extractor", "intent_router")
    )
    (folder / "serve.toml").write_text(f"port = {port}\n{models}")
    log = (folder / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "srl_rlvr", "serve", "serve.toml", "--model", str(folders["multimodal_vision"])],
        cwd=folder, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
    while "console" not in (folder / "log").read_text():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.5)
    yield address, process
    process.terminate()
    process.wait(60)


def test_a_text_is_read_into_json_that_fits_whatever_the_weights(gateway: tuple[str, Any]) -> None:
    with Client(gateway[0]) as client:
        found = client.extract("Rome is old", SCHEMA)
        assert found.data["city"] in ("Rome", "Oslo") and isinstance(found.data["old"], bool) and not found.repaired
        assert client.route("where is my card").data[0].label == "card"
        assert client.feedback(found.request_id, correction={"city": "Rome"}).recorded
        with pytest.raises(ApiError, match="did you mean 'extractor'"):
            client.extract("a", SCHEMA, model="extracter")


def test_openais_client_chats_streams_and_gets_json(gateway: tuple[str, Any]) -> None:
    openai = pytest.importorskip("openai")
    asked: Any = {"model": "extractor", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    with openai.OpenAI(base_url=f"{gateway[0]}/v1", api_key="any") as client:
        whole = client.chat.completions.create(**asked, max_tokens=20).choices[0].message.content
        pieces = client.chat.completions.create(**asked, max_tokens=20, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == (whole or "")
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
        text = client.chat.completions.create(**asked, max_tokens=60, response_format=form).choices[0].message.content
        assert '"city"' in text
        for wrong in ({"logit_bias": {"a": 1}}, {"messages": [{"role": "user", "content": "a" * 600}]}):
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(**asked | wrong)


def test_a_client_that_leaves_stops_the_answer_that_it_waited_for(gateway: tuple[str, Any]) -> None:
    body = {"model": "extractor", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 400}
    with httpx2.Client(base_url=gateway[0], timeout=60) as client:
        for _ in range(40):  # more than run at once: were they to go on, the last would wait for the first
            with client.stream("POST", "/v1/chat/completions", json=body | {"ignore_eos": True}) as response:
                next(response.iter_lines())
        began = time.monotonic()
        assert client.post("/v1/chat/completions", json=body | {"stream": False, "max_tokens": 1}).status_code == 200
        assert time.monotonic() - began < 20


def test_a_replica_that_dies_costs_no_request(gateway: tuple[str, Any]) -> None:
    found: Counter[int] = Counter()
    killed = threading.Event()

    def ask(number: int) -> None:
        if number == 50 and not killed.is_set():
            [replica] = [p for p in psutil.process_iter() if p.name().startswith("ray::ServeReplica:intent_router")]
            os.kill(replica.pid, signal.SIGKILL)
            killed.set()
        response = httpx2.post(f"{gateway[0]}/v1/route", json={"input": "a"}, timeout=120)
        found[response.status_code] += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(200)))
    assert killed.is_set() and found == {200: 200}
    assert httpx2.get(f"{gateway[0]}/readyz").status_code == 200


def test_it_ends_when_it_is_told_to_and_leaves_no_process(gateway: tuple[str, subprocess.Popen]) -> None:
    _, process = gateway
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "./nowhere"), "no such folder"),
        (("--host", "0.0.0.0", "--model", "{model}"), "access.keys names no file"),
        (("--model", "{model}", "--model", "{model}"), "are called 'intent_router'"),
        (("absent.toml",), "cannot be read"),
        ((), "nothing to serve"),
        (("--new-key", "me", "--scope", "chatt"), "did you mean 'chat'"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_2(
    arguments: tuple[str, ...], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    given = [argument.format(model=folders["intent_router"]) for argument in arguments]
    finished = srl_rlvr("serve", *given, cwd=tmp_path)
    assert finished.code == 2 and said in finished.err and finished.err.count("\n") == 1


def test_a_champion_of_the_registry_is_found_and_written_for_ray_serve(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow")
    (tmp_path / "out").mkdir()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/out/mlflow.db")
    client.create_registered_model("routing")
    version = client.create_model_version("routing", folders["intent_router"].as_uri(), await_creation_for=0)
    client.set_registered_model_alias("routing", "champion", version.version)
    for arguments in ((), ("--model", "registry:routing")):
        finished = srl_rlvr("serve", *arguments, "--write-config", "ray.yaml", cwd=tmp_path)
        assert finished.code == 0, finished.err
        assert f"path: {folders['intent_router']}" in (tmp_path / "ray.yaml").read_text()
    wrong = srl_rlvr("serve", "--model", "registry:rooting", cwd=tmp_path)
    assert wrong.code == 2 and "did you mean 'routing'" in wrong.err
