"""Our client, and OpenAI's and Cohere's own, against the gateway behind a real HTTP server."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

import srl_rlvr
from srl_rlvr import client as client_module
from srl_rlvr.client import ApiError, AsyncClient, Client, NetworkError
from srl_rlvr.errors import InputError


def test_each_type_answers_the_client(address: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "PNG")
    with srl_rlvr.Client(f"{address}/v1/") as client:  # type: ignore[attr-defined]
        assert len(client.models()) == 7
        assert [len(vector) for vector in client.embed(["a", "b"], "embeddings")] == [32, 32]
        assert client.rerank("a", ["a", "b"], top_n=1).results[0].document.text in ("a", "b")
        routed = client.route("where is my card")
        assert routed.data[0].label == "card" and routed.request_id.startswith("req-")
        assert client.feedback(routed.request_id, reward=1).recorded
        assert client.chat("hi", "task_llm", max_tokens=3).choices
        assert isinstance(client.see(out.getvalue(), "what?").text, str)
        whole = client.chat("hi", "task_llm", temperature=1, seed=1).choices[0]["message"]["content"]
        assert whole and "".join(client.stream("hi", "task_llm", temperature=1, seed=1)) == whole
        for ask in (lambda: client.parse("he ran"), lambda: client.extract("Rome")):
            with pytest.raises(ApiError, match="no JSON"):
                ask()


def test_what_is_refused_says_why_and_by_which_request(address: str) -> None:
    with Client(address) as client:
        with pytest.raises(ApiError, match="did you mean 'task_llm'") as found:
            client.chat("hi", "task_lm")
        assert found.value.status == 404 and found.value.code == "model_not_found" and found.value.request_id
        with pytest.raises(ApiError, match="context"):
            list(client.stream("a" * 600, "task_llm"))


def test_the_async_client_does_the_same(address: str) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            found = await asyncio.gather(*(client.route("where is my card") for _ in range(20)))
            assert {routes.data[0].label for routes in found} == {"card"}
            assert [piece async for piece in client.stream("hi", "task_llm", seed=1)]
            assert len(await client.embed("a", "embeddings", dimensions=4)) == 1
            with pytest.raises(ApiError, match="no JSON"):
                await client.parse("he ran")

    asyncio.run(run())


def test_openais_client_works_unchanged(address: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any") as client:
        assert len(list(client.models.list())) == 7
        assert len(client.embeddings.create(model="embeddings", input=["a", "b"]).data[1].embedding) == 32
        asked = {"model": "task_llm", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        assert client.chat.completions.create(**asked).choices[0].finish_reason in ("stop", "length")
        pieces = list(client.chat.completions.create(**asked, stream=True))
        assert pieces[-1].choices[0].finish_reason
        assert client.completions.create(model="task_llm", prompt="a").choices[0].text is not None
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            client.chat.completions.create(**asked | {"model": "gpt"})
        with pytest.raises(openai.BadRequestError, match="context"):
            client.chat.completions.create(**asked | {"messages": [{"role": "user", "content": "a" * 600}]})


def test_coheres_clients_work_unchanged(address: str) -> None:
    cohere = pytest.importorskip("cohere")
    for kind in (cohere.Client, cohere.ClientV2):
        client = kind(api_key="any", base_url=address)
        found = client.rerank(model="reranker", query="a", documents=["a", "b", "c"], top_n=2)
        assert len(found.results) == 2 and found.results[0].relevance_score >= found.results[1].relevance_score


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "PNG")
    return out.getvalue()


def answering(client: Any, answer: Callable[[httpx2.Request], httpx2.Response]) -> Any:
    """The client before a server that is a function."""
    kind: Any = httpx2.AsyncClient if isinstance(client, AsyncClient) else httpx2.Client
    client._http = kind(**client._settings, transport=httpx2.MockTransport(answer))
    return client


def both(answer: Callable[[httpx2.Request], httpx2.Response], ask: Callable[[Any], Any], **settings: Any) -> list[Any]:
    """What each client returns or raises."""

    async def awaited() -> Any:
        return await ask(answering(AsyncClient(**settings), answer))

    found: list[Any] = []
    for run in (lambda: ask(answering(Client(**settings), answer)), lambda: asyncio.run(awaited())):
        try:
            found.append(run())
        except (ApiError, NetworkError, InputError) as error:
            found.append(error)
    return found


@pytest.mark.parametrize("form", ["text", "path", "bytes", "base64", "wrapped", "data", "address"])
def test_an_image_is_a_file_bytes_base64_or_an_address(form: str, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png())
    encoded = base64.b64encode(png()).decode()
    forms = {
        "text": str(tmp_path / "photo.png"),
        "path": tmp_path / "photo.png",
        "bytes": png(),
        "base64": encoded,
        "wrapped": "\n".join(encoded[at : at + 20] for at in range(0, len(encoded), 20)),
        "data": f"data:image/png;base64,{encoded}",
        "address": "https://example.org/photo.png",
    }
    kept = forms[form] if form in ("data", "address") else encoded
    assert client_module._shown(forms[form]) == [kept]
    assert client_module._shown([forms[form], forms[form]]) == [kept, kept]


@pytest.mark.parametrize("given", ["photo.png", "phot", "", "no file", Path("photo.png"), "a" * 5000 + "!", "a\0b"])
def test_what_is_no_image_is_named(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="image"):
        client_module._shown(given)


def test_a_gateway_that_is_not_there_is_an_error_of_ours_with_its_address() -> None:
    with Client("http://127.0.0.1:9", timeout_s=5) as client:
        with pytest.raises(NetworkError, match="http://127.0.0.1:9 cannot be reached") as found:
            client.models()
        assert found.value.address == "http://127.0.0.1:9"
        with pytest.raises(NetworkError):
            list(client.stream("hi", "m"))
    with pytest.raises(InputError, match="base_url"):
        Client("127.0.0.1:8000")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (httpx2.ReadTimeout("slow"), "timeout_s"),
        (httpx2.RemoteProtocolError("broken"), "broke off"),
        (httpx2.ConnectTimeout("slow"), "cannot be reached"),
        (httpx2.ReadError("reset"), "broke off"),
    ],
)
def test_each_fault_of_the_network_is_an_error_of_ours(raised: Exception, said: str) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        raise raised

    for found in both(answer, lambda client: client.route("hi")):
        assert isinstance(found, NetworkError) and said in str(found)


def test_a_stream_that_ends_too_early_is_an_error() -> None:
    event = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
    client = answering(Client(), lambda request: httpx2.Response(200, content=event))
    pieces = client.stream("hi", "m")
    assert next(pieces) == "a"
    with pytest.raises(NetworkError, match="broke off"):
        next(pieces)
    whole = answering(Client(), lambda request: httpx2.Response(200, content=event + b"data: [DONE]\n\n"))
    assert list(whole.stream("hi", "m")) == ["a"]


BUSY = {"error": {"message": "busy", "code": "overloaded"}}
ROUTED = {"model": "m", "data": []}


@pytest.mark.parametrize(
    ("status", "header", "refusals", "settings", "asked"),
    [
        (429, "1", 2, {}, 3),  # and the third is answered
        (503, "1", 2, {}, 3),
        (503, "1", 9, {}, 3),  # at most so often
        (429, "1", 9, {"retries": 0}, 1),
        (429, "500", 9, {}, 1),  # longer than timeout_s
        (429, "", 9, {}, 1),
        (429, "soon", 9, {}, 1),
        (500, "1", 9, {}, 1),
        (400, "1", 9, {}, 1),
    ],
)
def test_retry_after_is_honored(
    status: int, header: str, refusals: int, settings: Any, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    async def later(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(client_module.time, "sleep", waited.append)
    monkeypatch.setattr(client_module.asyncio, "sleep", later)
    requests = 0

    def answer(request: httpx2.Request) -> httpx2.Response:
        nonlocal requests
        requests += 1
        if (requests - 1) % asked < refusals:
            return httpx2.Response(status, json=BUSY, headers={"retry-after": header} if header else {})
        return httpx2.Response(200, json=ROUTED)

    for found in both(answer, lambda client: client.route("hi"), **settings):
        assert isinstance(found, ApiError) == (refusals > 2)
        if isinstance(found, ApiError):
            assert found.status == status and found.retry_after == (float(header) if header.isdecimal() else 0)
    assert requests == 2 * asked and waited == [1.0] * 2 * (asked - 1)


def test_a_date_of_retry_after_is_read() -> None:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    response = httpx2.Response(429, headers={"retry-after": date})
    assert 25 < client_module._retry_after(response) <= 30


def test_without_a_model_the_only_one_that_fits_is_asked() -> None:
    asked: list[str] = []

    def served(*types: str) -> Callable[[httpx2.Request], httpx2.Response]:
        def answer(request: httpx2.Request) -> httpx2.Response:
            asked.append(request.url.path)
            if request.url.path == "/v1/models":
                data = [{"id": f"my-{kind}-{n}", "created": 1, "model_type": kind} for n, kind in enumerate(types)]
                return httpx2.Response(200, json={"data": data})
            name = json.loads(request.content)["model"]
            usage = {"prompt_tokens": 1, "total_tokens": 1}
            common = {"id": "1", "object": "list", "created": 1, "model": name, "usage": usage}
            return httpx2.Response(200, json=common | {"choices": [], "data": []})

        return answer

    client = answering(Client(), served("intent_router", "task_llm", "extractor"))
    assert client.chat("hi").model == client.chat("hi").model == "my-task_llm-1"
    assert asked.count("/v1/models") == 1
    for found in both(served("translator", "embeddings"), lambda client: client.chat("hi")):
        assert found.model == "my-translator-0"
    for found in both(served("extractor"), lambda client: client.chat("hi")):
        assert found.model == "my-extractor-0"
    for found in both(served("task_llm", "task_llm"), lambda client: client.chat("hi")):
        assert isinstance(found, InputError) and "my-task_llm-0, my-task_llm-1" in str(found)
    for found in both(served("task_llm"), lambda client: client.embed("hi")):
        assert isinstance(found, InputError)
    for found in both(served("task_llm", "embeddings"), lambda client: client.embed([])):
        assert found == []


@pytest.mark.parametrize("body", [b"[]", b'"x"', b'{"error": "busy"}', b'{"detail": "no"}', b"<html>", b"3"])
@pytest.mark.parametrize("status", [200, 404])
def test_the_answer_of_another_server_is_told_as_such(status: int, body: bytes) -> None:
    for found in both(lambda request: httpx2.Response(status, content=body), lambda client: client.route("hi")):
        assert isinstance(found, ApiError) and "base_url" in str(found) and found.status == status


def test_a_comment_alone_is_feedback(address: str) -> None:
    with Client(address) as client:
        id = client.route("where is my card").request_id
        assert client.feedback(id, comment="slow").recorded
        for nothing in (None, " "):
            with pytest.raises(ApiError, match="'comment'"):
                client.feedback(id, comment=nothing)
