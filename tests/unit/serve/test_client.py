"""Our client, and OpenAI's and Cohere's own, against the gateway behind a real HTTP server."""

from __future__ import annotations

import asyncio
import io

import pytest
from PIL import Image

import srl_rlvr
from srl_rlvr.client import ApiError, AsyncClient, Client


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
