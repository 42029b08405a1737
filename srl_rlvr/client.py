"""The gateway from Python: seven types, sync and async, with typed answers.

    with Client("http://127.0.0.1:8000", api_key="srl-…") as client:
        print(client.route("where is my card?").data[0].label)

Both clients have the same methods; those of `AsyncClient` are awaited. Every answer has its `request_id`, which
`feedback` takes. What the gateway refuses raises `ApiError`. Without `model` the only one of the type is asked.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel

from srl_rlvr import api
from srl_rlvr.errors import RunError

Form = TypeVar("Form", bound=BaseModel)
Image = bytes | Path | str
"""Encoded bytes, a file, or a text: base64 or an address."""
Messages = str | Sequence[Mapping[str, Any]]
"""A question, or a conversation in OpenAI's form."""


class ApiError(RunError):
    """What the gateway refused: HTTP status, request id and, where it says so, the seconds until it is worth another
    try."""

    def __init__(self, status: int, message: str, code: str | None = None, id: str = "", retry_after: float = 0.0):
        super().__init__(f"{message} (status {status}, request {id or 'unknown'})")
        self.status, self.message, self.code, self.request_id, self.retry_after = status, message, code, id, retry_after


class Client:
    def __init__(self, base_url: str = "http://127.0.0.1:8000", api_key: str = "", timeout_s: float = 120.0):
        self._http = httpx2.Client(**_settings(base_url, api_key, timeout_s))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[api.ModelInfo]:
        return _read(self._http.get("/v1/models"), api.Models).data

    def chat(self, messages: Messages, model: str, **settings: Any) -> api.Generated:
        """`settings` as OpenAI names them: temperature, max_tokens, response_format …"""
        return self._post("chat/completions", _chat(messages, model, settings), api.Generated)

    def stream(self, messages: Messages, model: str, **settings: Any) -> Iterator[str]:
        """The answer's text, piece by piece."""
        body = _chat(messages, model, settings | {"stream": True})
        with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code >= 400:
                response.read()
                _read(response, api.Generated)
            for line in response.iter_lines():
                if piece := _piece(line):
                    yield piece

    def embed(self, texts: str | Sequence[str], model: str, dimensions: int | None = None) -> list[list[float]]:
        """[texts, D] of length 1."""
        return _vectors(self._post("embeddings", _embed(texts, model, dimensions), api.Embeddings))

    def rerank(
        self, query: str, documents: Sequence[str], model: str | None = None, top_n: int | None = None
    ) -> api.Reranked:
        return self._post("rerank", _rerank(query, documents, model, top_n), api.Reranked)

    def route(
        self, texts: str | Sequence[str], model: str | None = None, labels: Mapping[str, str] | None = None
    ) -> api.Routes:
        """`labels`: names and descriptions, instead of those that the model was trained on."""
        return self._post("route", _route(texts, model, labels), api.Routes)

    def parse(self, texts: str | Sequence[str], model: str | None = None) -> api.Parses:
        return self._post("parse", {"input": _list(texts), "model": model}, api.Parses)

    def extract(self, text: str, schema: Mapping[str, Any] | None = None, model: str | None = None) -> api.Extracted:
        return self._post("extract", {"input": text, "schema": schema, "model": model}, api.Extracted)

    def see(self, image: Image | Sequence[Image], question: str | None = None, model: str | None = None) -> api.Seen:
        return self._post("vision", {"images": _shown(image), "question": question, "model": model}, api.Seen)

    def feedback(
        self, request_id: str, reward: float | None = None, correction: Any = None, comment: str | None = None
    ) -> api.Recorded:
        """`reward` in [-1, 1]."""
        return self._post("feedback", _feedback(request_id, reward, correction, comment), api.Recorded)

    def _post(self, endpoint: str, body: Mapping[str, Any], form: type[Form]) -> Form:
        return _read(self._http.post(f"/v1/{endpoint}", json=_said(body)), form)


class AsyncClient:
    """As `Client`."""

    def __init__(self, base_url: str = "http://127.0.0.1:8000", api_key: str = "", timeout_s: float = 120.0):
        self._http = httpx2.AsyncClient(**_settings(base_url, api_key, timeout_s))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[api.ModelInfo]:
        return _read(await self._http.get("/v1/models"), api.Models).data

    async def chat(self, messages: Messages, model: str, **settings: Any) -> api.Generated:
        return await self._post("chat/completions", _chat(messages, model, settings), api.Generated)

    async def stream(self, messages: Messages, model: str, **settings: Any) -> AsyncIterator[str]:
        body = _chat(messages, model, settings | {"stream": True})
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code >= 400:
                await response.aread()
                _read(response, api.Generated)
            async for line in response.aiter_lines():
                if piece := _piece(line):
                    yield piece

    async def embed(self, texts: str | Sequence[str], model: str, dimensions: int | None = None) -> list[list[float]]:
        return _vectors(await self._post("embeddings", _embed(texts, model, dimensions), api.Embeddings))

    async def rerank(
        self, query: str, documents: Sequence[str], model: str | None = None, top_n: int | None = None
    ) -> api.Reranked:
        return await self._post("rerank", _rerank(query, documents, model, top_n), api.Reranked)

    async def route(
        self, texts: str | Sequence[str], model: str | None = None, labels: Mapping[str, str] | None = None
    ) -> api.Routes:
        return await self._post("route", _route(texts, model, labels), api.Routes)

    async def parse(self, texts: str | Sequence[str], model: str | None = None) -> api.Parses:
        return await self._post("parse", {"input": _list(texts), "model": model}, api.Parses)

    async def extract(
        self, text: str, schema: Mapping[str, Any] | None = None, model: str | None = None
    ) -> api.Extracted:
        return await self._post("extract", {"input": text, "schema": schema, "model": model}, api.Extracted)

    async def see(
        self, image: Image | Sequence[Image], question: str | None = None, model: str | None = None
    ) -> api.Seen:
        return await self._post("vision", {"images": _shown(image), "question": question, "model": model}, api.Seen)

    async def feedback(
        self, request_id: str, reward: float | None = None, correction: Any = None, comment: str | None = None
    ) -> api.Recorded:
        return await self._post("feedback", _feedback(request_id, reward, correction, comment), api.Recorded)

    async def _post(self, endpoint: str, body: Mapping[str, Any], form: type[Form]) -> Form:
        return _read(await self._http.post(f"/v1/{endpoint}", json=_said(body)), form)


def _settings(base_url: str, api_key: str, timeout_s: float) -> dict[str, Any]:
    return {
        "base_url": base_url.rstrip("/").removesuffix("/v1"),
        "headers": {"authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": timeout_s,
    }


def _read(response: httpx2.Response, form: type[Form]) -> Form:
    """Raises ApiError."""
    # Behind Ray Serve's proxy, which has an x-request-id of its own, the gateway's has another name.
    id = response.headers.get("x-gateway-request-id") or response.headers.get("x-request-id", "")
    try:
        found = response.json()
    except ValueError:
        raise ApiError(response.status_code, "the answer is no JSON; is this the gateway's address?", id=id) from None
    if response.status_code >= 400:
        error, wait = found.get("error", {}), float(response.headers.get("retry-after", 0))
        raise ApiError(response.status_code, error.get("message", "no message"), error.get("code"), id, wait)
    return form.model_validate({"request_id": id} | found)


def _said(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _list(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _chat(messages: Messages, model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    told = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return {"model": model, "messages": told, **settings}


def _piece(line: str) -> str:
    """The text in a line of a stream, if there is some. Raises ApiError where it says what went wrong."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return ""
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise ApiError(500, event["error"]["message"], event["error"].get("code"))
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _embed(texts: str | Sequence[str], model: str, dimensions: int | None) -> dict[str, Any]:
    return {"input": _list(texts), "model": model, "dimensions": dimensions, "encoding_format": "base64"}


def _vectors(found: api.Embeddings) -> list[list[float]]:
    import numpy as np

    return [np.frombuffer(base64.b64decode(str(row.embedding)), "<f4").tolist() for row in found.data]


def _rerank(query: str, documents: Sequence[str], model: str | None, top_n: int | None) -> dict[str, Any]:
    return {"query": query, "documents": list(documents), "model": model, "top_n": top_n, "return_documents": True}


def _route(texts: str | Sequence[str], model: str | None, labels: Mapping[str, str] | None) -> dict[str, Any]:
    return {"input": _list(texts), "model": model, "labels": None if labels is None else dict(labels)}


def _shown(image: Image | Sequence[Image]) -> list[str]:
    images = [image] if isinstance(image, bytes | Path | str) else image
    return [one if isinstance(one, str) else base64.b64encode(_bytes(one)).decode() for one in images]


def _bytes(image: bytes | Path) -> bytes:
    return image if isinstance(image, bytes) else image.read_bytes()


def _feedback(request_id: str, reward: float | None, correction: Any, comment: str | None) -> dict[str, Any]:
    return {"request_id": request_id, "reward": reward, "correction": correction, "comment": comment}
