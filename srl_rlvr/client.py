"""The gateway from Python: seven types, sync and async, with typed answers.

    with Client("http://127.0.0.1:8000", api_key="srl-…") as client:
        print(client.route("where is my card?").data[0].label)

Both clients have the same methods; those of `AsyncClient` are awaited. Every answer has its `request_id`, which
`feedback` takes. Without `model` the only model that fits the method is asked. A request that is refused raises
`ApiError`, one that gets no answer `NetworkError`, and an argument that cannot be sent `InputError`. If the gateway
says when to come back (429 and 503 with `Retry-After`), the client waits and tries again.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import email.utils
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from srl_rlvr import api
from srl_rlvr.errors import InputError, RunError

Form = TypeVar("Form", bound=BaseModel)
Image = bytes | os.PathLike[str] | str
"""Encoded bytes, a file, or a text: the path of a file, a data: or http(s) address, or base64."""
Messages = str | Sequence[Mapping[str, Any]]
"""A question, or a conversation in OpenAI's form."""

_ENCODERS = ("embeddings", "reranker", "intent_router")
_OWN_ENDPOINT = (*_ENCODERS, "srl_parser", "extractor", "multimodal_vision")
_SMALLEST_IMAGE = 24  # bytes; a text that decodes to fewer is a path that does not exist


class ApiError(RunError):
    """The gateway refused the request. Holds the HTTP status, the request id and, if the gateway says it, the seconds
    until another try is worth it."""

    def __init__(self, status: int, message: str, code: str | None = None, id: str = "", retry_after: float = 0.0):
        super().__init__(f"{message} (status {status}, request {id or 'unknown'})")
        self.status, self.message, self.code, self.request_id, self.retry_after = status, message, code, id, retry_after


class NetworkError(RunError):
    """The gateway gave no answer, or the connection broke off. `address` is the gateway's."""

    def __init__(self, message: str, address: str):
        super().__init__(message)
        self.message, self.address = message, address


class _Base:
    """What both clients know: the address, how long to wait and how often to try, and the models that are served."""

    def __init__(self, base_url: str, api_key: str, timeout_s: float, retries: int):
        address = base_url.strip().rstrip("/").removesuffix("/v1")
        if not address.lower().startswith(("http://", "https://")):
            raise InputError(f"base_url is '{base_url}'; it should begin with http:// or https://")
        self._address, self._timeout_s, self._retries = address, timeout_s, retries
        self._served: list[api.ModelInfo] = []
        self._settings: dict[str, Any] = {
            "base_url": address,
            "headers": {"authorization": f"Bearer {api_key.strip()}"} if api_key else {},
            "timeout": timeout_s,
        }

    def _pause(self, response: httpx2.Response, tries: int) -> float | None:
        """Seconds until the request is sent again; None if it is not."""
        if response.status_code == 404:
            self._served = []  # other models are served now
        wait = _retry_after(response)
        again = response.status_code in (429, 503) and tries < self._retries and 0 < wait <= self._timeout_s
        return wait if again else None

    def _failed(self, error: Exception) -> NoReturn:
        """Raises NetworkError."""
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.InvalidURL):
            said = f"{self._address} cannot be reached ({error}): start 'srl-rlvr serve' there, or change base_url"
        elif isinstance(error, httpx2.TimeoutException):
            said = f"{self._address} gave no answer within {self._timeout_s:g} s; timeout_s sets how long to wait"
        else:
            said = f"the connection to {self._address} broke off before the end of the answer ({error}); ask again"
        raise NetworkError(said, self._address) from error


class Client(_Base):
    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str = "",
        timeout_s: float = 120.0,
        retries: int = 2,  # after 429 and 503, if the gateway says when
    ):
        super().__init__(base_url, api_key, timeout_s, retries)
        self._http = httpx2.Client(**self._settings)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[api.ModelInfo]:
        return _read(self._send("GET", "/v1/models"), api.Models).data

    def chat(self, messages: Messages, model: str | None = None, **settings: Any) -> api.Generated:
        """`settings` as OpenAI names them: temperature, max_tokens, response_format …"""
        body = _chat(messages, model or self._only(_writers), settings)
        return self._post("chat/completions", body, api.Generated)

    def stream(self, messages: Messages, model: str | None = None, **settings: Any) -> Iterator[str]:
        """The answer's text, piece by piece."""
        body = _chat(messages, model or self._only(_writers), settings | {"stream": True})
        response = self._send("POST", "/v1/chat/completions", body, stream=True)
        try:
            if response.status_code >= 400:
                response.read()
                _read(response, api.Generated)
            events = _Events()
            for line in response.iter_lines():
                if piece := events.piece(line):
                    yield piece
            events.check_ended()
        except httpx2.HTTPError as error:
            self._failed(error)
        finally:
            response.close()

    def embed(
        self, texts: str | Sequence[str], model: str | None = None, dimensions: int | None = None
    ) -> list[list[float]]:
        """[texts, D] of length 1."""
        body = _embed(texts, model or self._only(_embedders), dimensions)
        return _vectors(self._post("embeddings", body, api.Embeddings))

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
        """One of the three or more; `reward` in [-1, 1]."""
        return self._post("feedback", _feedback(request_id, reward, correction, comment), api.Recorded)

    def _post(self, endpoint: str, body: Mapping[str, Any], form: type[Form]) -> Form:
        return _read(self._send("POST", f"/v1/{endpoint}", _said(body)), form)

    def _only(self, fitting: Fitting) -> str:
        self._served = self._served or self.models()
        return _default(self._served, fitting)

    def _send(self, method: str, path: str, body: Any = None, stream: bool = False) -> httpx2.Response:
        request = self._http.build_request(method, path, json=body)
        for tries in itertools.count():
            try:
                response = self._http.send(request, stream=stream)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                self._failed(error)
            wait = self._pause(response, tries)
            if wait is None:
                return response
            response.close()
            time.sleep(wait)
        raise AssertionError


class AsyncClient(_Base):
    """As `Client`."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str = "",
        timeout_s: float = 120.0,
        retries: int = 2,
    ):
        super().__init__(base_url, api_key, timeout_s, retries)
        self._http = httpx2.AsyncClient(**self._settings)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[api.ModelInfo]:
        return _read(await self._send("GET", "/v1/models"), api.Models).data

    async def chat(self, messages: Messages, model: str | None = None, **settings: Any) -> api.Generated:
        body = _chat(messages, model or await self._only(_writers), settings)
        return await self._post("chat/completions", body, api.Generated)

    async def stream(self, messages: Messages, model: str | None = None, **settings: Any) -> AsyncIterator[str]:
        body = _chat(messages, model or await self._only(_writers), settings | {"stream": True})
        response = await self._send("POST", "/v1/chat/completions", body, stream=True)
        try:
            if response.status_code >= 400:
                await response.aread()
                _read(response, api.Generated)
            events = _Events()
            async for line in response.aiter_lines():
                if piece := events.piece(line):
                    yield piece
            events.check_ended()
        except httpx2.HTTPError as error:
            self._failed(error)
        finally:
            await response.aclose()

    async def embed(
        self, texts: str | Sequence[str], model: str | None = None, dimensions: int | None = None
    ) -> list[list[float]]:
        body = _embed(texts, model or await self._only(_embedders), dimensions)
        return _vectors(await self._post("embeddings", body, api.Embeddings))

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
        return _read(await self._send("POST", f"/v1/{endpoint}", _said(body)), form)

    async def _only(self, fitting: Fitting) -> str:
        self._served = self._served or await self.models()
        return _default(self._served, fitting)

    async def _send(self, method: str, path: str, body: Any = None, stream: bool = False) -> httpx2.Response:
        request = self._http.build_request(method, path, json=body)
        for tries in itertools.count():
            try:
                response = await self._http.send(request, stream=stream)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                self._failed(error)
            wait = self._pause(response, tries)
            if wait is None:
                return response
            await response.aclose()
            await asyncio.sleep(wait)
        raise AssertionError


def _retry_after(response: httpx2.Response) -> float:
    """Seconds, from a number or a date; 0.0 if the header is absent or neither."""
    said = response.headers.get("retry-after", "").strip()
    if said.isdecimal():
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return 0.0


def _read(response: httpx2.Response, form: type[Form]) -> Form:
    """Raises ApiError."""
    # Behind Ray Serve's proxy, which has an x-request-id of its own, the gateway's has another name.
    id = response.headers.get("x-gateway-request-id") or response.headers.get("x-request-id", "")
    status = response.status_code
    try:
        found = response.json()
    except ValueError:
        raise ApiError(status, "the answer is not JSON; is base_url the gateway's address?", id=id) from None
    if status >= 400:
        error = found.get("error") if isinstance(found, dict) else None
        error = error if isinstance(error, dict) else {}
        message = error.get("message") or "refused without a reason; is base_url the gateway's address?"
        raise ApiError(status, message, error.get("code"), id, _retry_after(response))
    try:
        return form.model_validate({"request_id": id} | found if isinstance(found, dict) else found)
    except ValidationError:
        raise ApiError(status, "the answer has another form; is base_url the gateway's address?", id=id) from None


Fitting = Callable[[Sequence[api.ModelInfo]], tuple[str, list[str]]]
"""The method that chooses, and the names of the models that fit it."""


def _default(served: Sequence[api.ModelInfo], fitting: Fitting) -> str:
    """Raises InputError unless one model fits."""
    method, names = fitting(served)
    if len(names) != 1:
        there = f"; there are {', '.join(names)}" if names else f"; none of the {len(served)} models here fits"
        raise InputError(f"{method} needs 'model'{there}")
    return names[0]


def _writers(served: Sequence[api.ModelInfo]) -> tuple[str, list[str]]:
    """Models that chat is the endpoint of; if there are none, others that write text."""
    of_chat = [model.id for model in served if _kind(model) not in _OWN_ENDPOINT]
    return "chat", of_chat or [model.id for model in served if _kind(model) not in _ENCODERS]


def _embedders(served: Sequence[api.ModelInfo]) -> tuple[str, list[str]]:
    return "embed", [model.id for model in served if _kind(model) == "embeddings"]


def _kind(model: api.ModelInfo) -> str:
    """The type itself, or for a type of one's own that whose endpoint it has."""
    return model.kind or model.model_type


def _said(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _list(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _chat(messages: Messages, model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    told = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return {"model": model, "messages": told, **settings}


class _Events:
    """Reads a stream's lines."""

    def __init__(self) -> None:
        self.ended = False

    def piece(self, line: str) -> str:
        """The text in a line, if there is some. Raises ApiError if the line says what went wrong."""
        if not line.startswith("data:"):
            return ""
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self.ended = True
            return ""
        event = json.loads(data)
        if "error" in event:
            raise ApiError(500, event["error"]["message"], event["error"].get("code"))
        choices = event.get("choices") or [{}]
        return choices[0].get("delta", {}).get("content") or ""

    def check_ended(self) -> None:
        if not self.ended:
            raise httpx2.RemoteProtocolError("no [DONE]")


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
    images = [image] if isinstance(image, bytes | os.PathLike | str) else image
    return [_sent(one) for one in images]


def _sent(image: Image) -> str:
    """Base64 or an address. Raises InputError if it is neither, and no file."""
    if isinstance(image, bytes):
        return base64.b64encode(image).decode()
    if isinstance(image, str):
        if image.lower().startswith(("data:", "http://", "https://")):
            return image
        if not os.path.isfile(image):
            return _checked(image)
    try:
        return base64.b64encode(Path(image).read_bytes()).decode()
    except OSError as error:
        raise InputError(f"image {image}: cannot be read ({error.strerror})") from None


def _checked(text: str) -> str:
    """The base64 without white space."""
    joined = "".join(text.split())
    try:
        size = len(base64.b64decode(joined, validate=True))
    except (binascii.Error, ValueError):
        size = 0
    if size < _SMALLEST_IMAGE:
        raise InputError(f"image '{text[:100]}': there is no such file, and it is no base64, data: or http(s) address")
    return joined


def _feedback(request_id: str, reward: float | None, correction: Any, comment: str | None) -> dict[str, Any]:
    return {"request_id": request_id, "reward": reward, "correction": correction, "comment": comment}
