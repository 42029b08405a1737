"""`srl-rlvr serve` as users start it: Ray, vLLM, our engine and an encoder, and the official client."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import served_models
from cli_runs import srl_rlvr

from srl_rlvr.client import ApiError, Client

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
ADAPTED = 10  # models on one base: more than vLLM keeps adapters of beside the layers
ASKED = ["river", "stone", "light"]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "old": {"type": "boolean"}},
    "required": ["city", "old"],
    "additionalProperties": False,
}


@dataclass
class Running:
    address: str
    process: subprocess.Popen[bytes]
    log: Path
    registry: Any  # MLflow's client; the router is its champion 'routing', the first that shares a base 'adapting'
    alone: dict[str, list[str]]  # what models that share a base answer ASKED with when they do not

    def champion(self, folder: Path, name: str = "routing") -> None:
        """Make the model in this folder the one of that name to be served."""
        version = self.registry.create_model_version(name, folder.as_uri(), await_creation_for=0)
        self.registry.set_registered_model_alias(name, "champion", version.version)

    def wait_for(self, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def running(folders: dict[str, Path], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """All tests' own; the last one ends it."""
    pytest.importorskip("vllm")
    mlflow = pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("serve")
    port = free_port()
    writing = [sys.executable, served_models.__file__, str(folder), str(tiny_model), str(ADAPTED), *ASKED]
    alone = json.loads(subprocess.run(writing, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    paths = ["registry:adapting", *list(alone)[1:]]
    sharing = "".join(
        f'[[models]]\npath = "{path}"\nname = "{name}"\nbase = "{tiny_model}"\n'
        for path, name in zip(paths, alone, strict=True)
    )
    (folder / "serve.toml").write_text(
        f'port = {port}\n[[models]]\npath = "{folders["extractor"]}"\nmax_tokens = 60\n'
        '[[models]]\npath = "registry:routing"\nname = "router"\n'
        f"{sharing}[upgrade]\nshare = 0.5\nrequests = 40\nregistry_every_s = 1\nslower = 100\n"
    )
    (folder / "out").mkdir()
    registry = mlflow.MlflowClient(f"sqlite:///{folder}/out/mlflow.db")
    command = [sys.executable, "-m", "srl_rlvr", "serve", "serve.toml", "--model", str(folders["multimodal_vision"])]
    log = folder / "log"
    for name, champion in (("routing", folders["intent_router"]), ("adapting", folder / next(iter(alone)))):
        registry.create_registered_model(name)
        version = registry.create_model_version(name, champion.as_uri(), await_creation_for=0)
        registry.set_registered_model_alias(name, "champion", version.version)
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    found = Running(f"http://127.0.0.1:{port}", process, log, registry, alone)
    found.wait_for("console", 300)
    yield found
    process.terminate()
    process.wait(60)


def test_a_text_is_read_into_json_that_fits_whatever_the_weights(running: Running) -> None:
    with Client(running.address) as client:
        found = client.extract("Rome is old", SCHEMA)
        assert found.data["city"] in ("Rome", "Oslo") and isinstance(found.data["old"], bool) and not found.repaired
        assert client.route("where is my card").data[0].label == "card"
        assert client.feedback(found.request_id, correction={"city": "Rome"}).recorded
        with pytest.raises(ApiError, match="did you mean 'extractor'"):
            client.extract("a", SCHEMA, model="extracter")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"city": {"enum": []}}, "required": ["city"]},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"type": "object", "properties": {"city": False}, "required": ["city"]},
    ],
)
def test_a_schema_that_nothing_fits_is_refused_and_the_next_request_answered(running: Running, schema: Any) -> None:
    with Client(running.address, timeout_s=60) as client:
        with pytest.raises(ApiError) as found:
            client.extract("Rome is old", schema)
        assert found.value.status in (400, 422) and "\n" not in str(found.value)
        assert client.extract("Rome is old", SCHEMA).data["city"] in ("Rome", "Oslo")


def test_openais_client_chats_streams_and_gets_json(running: Running) -> None:
    openai = pytest.importorskip("openai")
    asked: Any = {"model": "extractor", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    with openai.OpenAI(base_url=f"{running.address}/v1", api_key="any") as client:
        whole = client.chat.completions.create(**asked, max_tokens=20).choices[0].message.content
        pieces = client.chat.completions.create(**asked, max_tokens=20, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == (whole or "")
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
        text = client.chat.completions.create(**asked, max_tokens=60, response_format=form).choices[0].message.content
        assert '"city"' in text
        for wrong in ({"logit_bias": {"a": 1}}, {"messages": [{"role": "user", "content": "a" * 600}]}):
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(**asked | wrong)


def test_requests_above_grpcs_own_limit_are_answered_and_fail_no_neighbor(running: Running) -> None:
    from PIL import Image

    photograph = io.BytesIO()
    Image.effect_noise((2400, 2400), 90).save(photograph, "PNG")
    assert len(photograph.getvalue()) > 4 * 2**20

    def ask(body: dict[str, Any], path: str = "route") -> int:
        return httpx2.post(f"{running.address}/v1/{path}", json=body, timeout=120).status_code

    image = base64.b64encode(photograph.getvalue()).decode()
    large = {"input": ["word " * 1000] * 1000}
    calls = [({"input": ["word " * 20] * 100},)] * 40 + [(large,)] + [({"input": "a"},)] * 20
    with ThreadPoolExecutor(len(calls)) as together:
        assert Counter(together.map(lambda call: ask(*call), calls)) == {200: len(calls)}
    assert ask({"image": image, "question": "what?"}, "vision") == 200


def test_models_that_share_a_base_write_as_each_does_alone(running: Running) -> None:
    openai = pytest.importorskip("openai")
    asked = [{"role": "user", "content": text} for text in ASKED]
    expected = running.alone
    assert len(set(map(tuple, expected.values()))) == len(expected)
    with openai.OpenAI(base_url=f"{running.address}/v1", api_key="any") as client, ThreadPoolExecutor(8) as pool:

        def ask(name: str, message: Any) -> Any:
            return client.chat.completions.create(model=name, messages=[message], temperature=0, max_tokens=12)

        pending = {name: [pool.submit(ask, name, message) for message in asked] for name in expected}
        for name, of in pending.items():
            found = [each.result() for each in of]
            assert [each.choices[0].message.content for each in found] == expected[name]
            assert {each.model for each in found} == {name}
        name, texts = next(iter(expected.items()))
        pieces = client.chat.completions.create(
            model=name,
            messages=[asked[0]],
            temperature=0,
            max_tokens=12,
            stream=True,  # type: ignore[arg-type]
        )
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == texts[0]


def test_a_client_that_leaves_stops_the_answer_that_it_waited_for(running: Running) -> None:
    body = {"model": "extractor", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 400}
    endless = body | {"logit_bias": {"0": -100}}  # the end of text
    with httpx2.Client(base_url=running.address, timeout=60) as client:
        for _ in range(40):  # more than run at once: were they to go on, the last would wait for the first
            with client.stream("POST", "/v1/chat/completions", json=endless) as response:
                next(response.iter_lines())
            with pytest.raises(httpx2.ReadTimeout):
                whole = endless | {"stream": False}
                client.post("/v1/chat/completions", json=whole, timeout=0.05)
        began = time.monotonic()
        assert client.post("/v1/chat/completions", json=body | {"stream": False, "max_tokens": 1}).status_code == 200
        assert time.monotonic() - began < 20


def test_a_replica_that_dies_costs_no_request(running: Running) -> None:
    found: Counter[int] = Counter()
    killed = threading.Event()

    def ask(number: int) -> None:
        if number == 50 and not killed.is_set():
            [replica] = [p for p in psutil.process_iter() if p.name().startswith("ray::ServeReplica:router")]
            os.kill(replica.pid, signal.SIGKILL)
            killed.set()
        response = httpx2.post(f"{running.address}/v1/route", json={"input": "a"}, timeout=120)
        found[response.status_code] += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(200)))
    assert killed.is_set() and found == {200: 200}
    assert httpx2.get(f"{running.address}/readyz").status_code == 200


def part_of(running: Running, name: str) -> psutil.Process:
    """The first process below this server's whose command line begins so."""
    below = psutil.Process(running.process.pid).children(recursive=True)
    alive = (process for process in below if process.status() != psutil.STATUS_ZOMBIE)
    return next(process for process in alive if " ".join(process.cmdline()).startswith(name))


def test_an_engine_that_dies_costs_no_request(running: Running) -> None:
    found: Counter[int] = Counter()
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            response = httpx2.post(
                f"{running.address}/v1/extract", json={"input": "Rome", "schema": SCHEMA}, timeout=150
            )
            found[response.status_code] += 1

    replica = part_of(running, "ray::ServeReplica:extractor")
    [engine] = [child for child in replica.children() if " ".join(child.cmdline()).startswith("VLLM::Engine")]
    with ThreadPoolExecutor(4) as pool:
        pending = [pool.submit(load) for _ in range(4)]
        time.sleep(1)
        engine.kill()
        replica.wait(5)
        assert httpx2.get(f"{running.address}/readyz", timeout=60).status_code == 503
        deadline = time.monotonic() + 200
        while httpx2.get(f"{running.address}/readyz", timeout=60).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(1)
        over.set()
        for each in pending:
            each.result()
    assert set(found) <= {200, 503, 504} and found[200]


def test_ray_serves_controller_dies_and_the_models_go_on(running: Running) -> None:
    replica, longest = part_of(running, "ray::ServeReplica:extractor"), 0.0
    part_of(running, "ray::ServeController").kill()
    until = time.monotonic() + 30
    while time.monotonic() < until:
        began = time.monotonic()
        response = httpx2.post(f"{running.address}/v1/extract", json={"input": "Rome", "schema": SCHEMA}, timeout=120)
        assert response.status_code == 200
        longest = max(longest, time.monotonic() - began)
    assert replica.is_running() and longest < 15


def test_a_new_champion_takes_over_under_load_and_no_request_fails(
    running: Running, folders: dict[str, Path], tmp_path: Path
) -> None:
    newer = shutil.copytree(folders["intent_router"], tmp_path / "newer")
    card = json.loads((newer / "model_card.json").read_text())
    card["labels"] = {f"new {name}": text for name, text in card["labels"].items()}
    (newer / "model_card.json").write_text(json.dumps(card))
    found: Counter[tuple[int, str]] = Counter()
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            response = httpx2.post(f"{running.address}/v1/route", json={"input": "where is my card"}, timeout=120)
            found[response.status_code, response.json()["data"][0]["label"]] += 1

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        running.champion(newer)
        running.wait_for("router: the new version has taken over", 240)
        running.champion(folders["reranker"])  # no router
        running.wait_for("router: the old version stays", 60)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert {status for status, _ in found} == {200}
    assert {label for _, label in found} == {"card", "new card"}
    with Client(running.address) as client:
        assert {client.route("where is my card").data[0].label for _ in range(10)} == {"new card"}


def test_a_new_champion_takes_over_among_those_that_share_its_base(running: Running) -> None:
    changed, other, *_ = running.alone
    text = {"messages": [{"role": "user", "content": ASKED[0]}], "temperature": 0, "max_tokens": 12}
    found: dict[str, Counter[str]] = {changed: Counter(), other: Counter()}
    over = threading.Event()

    def load(name: str) -> None:
        while not over.is_set():
            response = httpx2.post(f"{running.address}/v1/chat/completions", json=text | {"model": name}, timeout=120)
            assert response.status_code == 200, response.text
            found[name][response.json()["choices"][0]["message"]["content"]] += 1

    with ThreadPoolExecutor(4) as pool:
        pending = [pool.submit(load, name) for name in (changed, other, changed, other)]
        try:
            running.champion(running.log.parent / other, "adapting")  # the other's weights by the changed one's name
            running.wait_for(f"{changed}: the new version has taken over", 300)
        finally:
            over.set()
        for each in pending:
            each.result()
    assert set(found[changed]) == {running.alone[changed][0], running.alone[other][0]}
    assert set(found[other]) == {running.alone[other][0]}
    with Client(running.address) as client:
        answer = client.chat(text["messages"], model=changed, temperature=0, max_tokens=12)
    assert answer.choices[0]["message"]["content"] == running.alone[other][0]


def test_it_ends_when_it_is_told_to_and_leaves_no_process(running: Running) -> None:
    process = running.process
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


def test_a_cluster_is_not_joined_from_outside(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text('address = "ray://127.0.0.1:10001"\n')
    finished = srl_rlvr("serve", "serve.toml", "--model", str(folders["intent_router"]), cwd=tmp_path)
    assert finished.code == 2 and "serve deploy" in finished.err and finished.err.count("\n") == 1


def test_ray_serves_own_command_deploys_the_file_that_is_written_for_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    port = free_port()
    finished = srl_rlvr(
        "serve", "--model", str(folders["intent_router"]), "--port", str(port), "--write-config", "ray.yaml",
        cwd=tmp_path,
    )  # fmt: skip
    assert finished.out == "serve deploy ray.yaml\n"
    command = [str(Path(sys.executable).with_name("serve")), "run", "ray.yaml"]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                response = httpx2.get(f"http://127.0.0.1:{port}/readyz", timeout=10)
                if response.status_code == 200:
                    break
            except httpx2.HTTPError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        with Client(f"http://127.0.0.1:{port}") as client:
            routed = client.route("where is my card")
            assert routed.data[0].label == "card" and client.feedback(routed.request_id, reward=1).recorded
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)


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
