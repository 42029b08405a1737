"""The front door: requests in OpenAI's, Cohere's and our own forms, checked, and sent to the model that they name.

It knows no model from the inside: `Models` finds a replica by name, and a replica answers calls by method name. What
holds for every request (its id, who asks, how large it is, how long it took) is `guard`'s.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pydantic_core
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from serve import guard, pages, pictures, schemas, spans
from serve.config import GatewaySettings, Limits, Served
from serve.errors import Refusal, error_form, refused
from serve.journal import Journal
from serve.sandbox import Sandbox
from srl_rlvr import __version__, api
from srl_rlvr.examples.names import nearest

CHAT = "/v1/chat/completions"
ENDPOINT_OF = {  # of what writes text and is not named here: chat
    "embeddings": "/v1/embeddings",
    "reranker": "/v1/rerank",
    "intent_router": "/v1/route",
    "srl_parser": "/v1/parse",
    "extractor": "/v1/extract",
    "multimodal_vision": "/v1/vision",
}
_REFUSED: dict[int | str, Any] = {
    status: {"model": api.Error} for status in (400, 401, 403, 404, 408, 413, 415, 422, 429)
}
_FAILED: dict[int | str, Any] = {status: {"model": api.Error} for status in (500, 503, 504)}
ERRORS = _REFUSED | _FAILED
_SHOWN = 100  # characters of what a client named
_ROWS_AT_ONCE = 64  # of embeddings, written before others have their turn
_SENTENCES_AT_ONCE = 16  # of one request, each a call of its own
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # of a stream, each
_STREAMED: dict[int | str, Any] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


class Replica(Protocol):
    """Where a model answers. Raises Refusal."""

    @property
    def name(self) -> str:
        """Of the version that it is of."""
        ...

    async def call(self, method: str, *arguments: Any) -> Any: ...

    def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]: ...


class Models:
    """The models by name, and who answers for them."""

    def __init__(self, served: Sequence[Served], pick: Callable[[str], Replica]):
        self.served = {model.name: model for model in served}
        self.pick = pick

    def named(self, name: str) -> Served:
        """Raises Refusal with the nearest name."""
        if name not in self.served:
            shown = name[:_SHOWN]
            raise Refusal(404, f"there is no model '{shown}'{nearest(shown, self.served)}", "model_not_found", "model")
        return self.served[name]

    def find(self, name: str | None, *types: str) -> tuple[str, Replica]:
        """The model of that name, which should be of one of these types; without a name the only one that is.

        Raises Refusal, as `named` does or with where such a model is asked.
        """
        fitting = [model.name for model in self.served.values() if (model.kind or model.model_type) in types]
        if name is None:
            if len(fitting) != 1:
                known = f"; there are {', '.join(fitting)}" if fitting else ""
                raise Refusal(400, f"'model' should name one of type {' or '.join(types)}{known}", param="model")
            name = fitting[0]
        model = self.named(name)
        if model.model_type not in types and model.kind not in types:
            where = ENDPOINT_OF.get(model.kind or model.model_type, CHAT if model.policy == "text" else "")
            said = f"ask it at {where}" if where else "no endpoint asks models of that type"
            raise Refusal(400, f"model '{name}' is of type {model.model_type}: {said}", param="model")
        return name, self.pick(name)


def create_app(
    settings: GatewaySettings,
    pick: Callable[[str], Replica],
    says_id: bool = True,
    background: Callable[[Journal], Coroutine[Any, Any, None]] | None = None,
) -> FastAPI:
    """The ASGI application.

    `pick` finds who answers a request for a model. `says_id` is false where what is before the application adds the
    header with the request's id, as Ray Serve's proxy does. `background` runs as long as the application.
    """
    journal = Journal(Path(settings.feedback))
    sandbox = Sandbox()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(background(journal)) if background else None
        yield
        sandbox.close()
        if task:
            task.cancel()

    app = FastAPI(
        title="srl-rlvr",
        version=__version__,
        responses=ERRORS,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect goes to whatever host the request names
    )
    app.state.journal = journal
    models, limits = Models(settings.models, pick), settings.limits
    writers = {model.model_type for model in settings.models if model.policy == "text"}
    guard.install(app, settings, journal, says_id, sandbox)
    _handle_errors(app)
    _describe(app, bool(settings.access.keys))

    async def ask(replica: Replica, method: str, *arguments: Any) -> Any:
        async with _Deadline(limits):
            return await replica.call(method, *arguments)

    @app.get("/healthz", tags=["state"])
    async def healthz() -> api.Health:
        return api.Health(status="ok")

    @app.get("/readyz", tags=["state"])
    async def readyz() -> api.Health:
        """Whether every model answers."""
        waiting = []
        for name in models.served:
            try:
                await asyncio.wait_for(models.pick(name).call("ready"), timeout=5)
            except (Refusal, TimeoutError):
                waiting.append(name)
        if waiting:
            raise Refusal(503, f"not ready: {', '.join(waiting)}", retry_after=1)
        return api.Health(status="ready")

    @app.get("/v1/models", tags=["models"])
    async def list_models() -> api.Models:
        return api.Models(data=[pages.model_info(model) for model in settings.models])

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def one_model(name: str) -> api.ModelInfo:
        return pages.model_info(models.named(name))

    @app.post(CHAT, tags=["text"], response_model=api.Generated, responses=_STREAMED)
    async def chat(asked: api.ChatRequest, request: Request) -> Response:
        """OpenAI's chat, as a stream where `stream` is true."""
        _, replica = note(request, *models.find(asked.model, *writers))
        body = asked.model_dump(exclude_unset=True)
        contents = [message.get("content") for message in body["messages"]]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        shown = [part for part in parts if part.get("type") == "image_url"]
        deadline = _Deadline(limits)
        async with deadline:
            encoded = await pictures.read_all([_address(part) for part in shown], settings.images, sandbox)
        for part, image in zip(shown, encoded, strict=True):
            part["image_url"] = {"url": pictures.data_address(image)}
        return await generate(request, replica, "chat", asked, body, deadline)

    @app.post("/v1/completions", tags=["text"], response_model=api.Generated, responses=_STREAMED)
    async def completions(asked: api.CompletionRequest, request: Request) -> Response:
        _, replica = note(request, *models.find(asked.model, *writers))
        _listed(asked.prompt, limits, "prompt")
        body = asked.model_dump(exclude_unset=True)
        return await generate(request, replica, "complete", asked, body, _Deadline(limits))

    async def generate(
        request: Request, replica: Replica, method: str, asked: api.Generation, body: dict[str, Any],
        deadline: _Deadline,
    ) -> Response:  # fmt: skip
        prompts = body.get("prompt")
        _charge(request, (len(prompts) if isinstance(prompts, list) else 1) * (asked.n or 1), limits)
        async with deadline:
            await schemas.check_response_format(asked.response_format, sandbox)
        body["request_id"] = request.state.id
        if not asked.stream:
            async with deadline:
                return JSONResponse(await replica.call(method, body))
        events = replica.stream(f"{method}_stream", body)
        async with deadline:  # what is refused has its own status, so the first event comes before the head
            first = await anext(events)
        return StreamingResponse(_after(request, first, events, deadline), media_type="text/event-stream")

    @app.post("/v1/embeddings", tags=["vectors"], response_model=api.Embeddings)
    async def embeddings(asked: api.EmbeddingsRequest, request: Request) -> Response:
        name, replica = note(request, *models.find(asked.model, "embeddings"))
        texts: Any = asked.input
        if asked.tokenizer and not isinstance(texts[0], str):
            lists = [texts] if isinstance(texts[0], int) else texts
            texts = await ask(replica, "decode", lists[: limits.texts + 1])
        vectors, tokens = await ask(replica, "embed", _listed(texts, limits), asked.dimensions)

        def shown(vector: Any) -> Any:
            if asked.encoding_format == "base64":
                return base64.b64encode(vector.astype("<f4").tobytes()).decode()
            return vector.tolist()

        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        # Without a second look, as these are numbers by the thousand; others are answered between the pieces.
        rows = []
        for number, vector in enumerate(vectors):
            row = {"object": "embedding", "index": number, "embedding": shown(vector)}
            rows.append(pydantic_core.to_json(row))
            if number % _ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
        rest = pydantic_core.to_json({"model": name, "usage": usage}).removeprefix(b"{")
        whole = b'{"object":"list","data":[' + b",".join(rows) + b"]," + rest
        return Response(whole, media_type="application/json")

    @app.post("/rerank", include_in_schema=False, response_model_exclude_none=True)
    @app.post("/v1/rerank", tags=["vectors"], response_model_exclude_none=True)
    @app.post(
        "/v2/rerank", tags=["vectors"], summary="The same, where Cohere's second client asks",
        response_model_exclude_none=True,
    )  # fmt: skip
    async def rerank(asked: api.RerankRequest, request: Request) -> api.Reranked:
        name, replica = note(request, *models.find(asked.model, "reranker"))
        texts = [d if isinstance(d, str) else d.text for d in asked.documents]
        scores, tokens = await ask(
            replica, "rerank", asked.query, _listed(texts, limits, "documents", may_be_empty=True)
        )
        order = sorted(range(len(texts)), key=lambda number: -scores[number])[: asked.top_n]
        results = [
            api.Ranked(
                index=number,
                relevance_score=float(scores[number]),
                document=api.Document(text=texts[number]) if asked.return_documents else None,
            )
            for number in order
        ]
        usage = api.Usage(prompt_tokens=tokens, total_tokens=tokens)
        return api.Reranked(id=request.state.id, model=name, results=results, usage=usage)

    @app.post("/v1/route", tags=["tasks"])
    async def route(asked: api.RouteRequest, request: Request) -> api.Routes:
        """A label for each text, or out of scope."""
        name, replica = note(request, *models.find(asked.model, "intent_router"))
        if asked.labels:
            _listed(list(asked.labels.values()), limits, "labels")
        found = await ask(replica, "route", _listed(asked.input, limits), asked.labels, asked.top_n)
        data = [
            api.Route(
                index=number,
                label=label,
                confidence=confidence,
                out_of_scope=label is None,
                alternatives=[api.Alternative(label=other, confidence=odds) for other, odds in alternatives],
            )
            for number, (label, confidence, alternatives) in enumerate(found)
        ]
        return api.Routes(model=name, data=data)

    @app.post("/v1/parse", tags=["tasks"])
    async def parse(asked: api.ParseRequest, request: Request) -> api.Parses:
        """The frames of each sentence: predicates, and who did what to whom."""
        name, replica = note(request, *models.find(asked.model, "srl_parser"))
        texts, room = _listed(asked.input, limits), asyncio.Semaphore(_SENTENCES_AT_ONCE)
        request.state.charge(len(texts) - 1)

        async def answer(text: str) -> Any:
            async with room:
                return await replica.call("answer", {"text": text})

        try:
            async with _Deadline(limits), asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(text)) for text in texts]
        except ExceptionGroup as failed:  # the others are cancelled
            raise failed.exceptions[0] from None
        answers = [task.result() for task in tasks]
        data = [
            api.Parse(index=number, frames=spans.placed(found["answer"], text))
            for number, (text, found) in enumerate(zip(texts, answers, strict=True))
        ]
        return api.Parses(model=name, data=data)

    @app.post("/v1/extract", tags=["tasks"])
    async def extract(asked: api.ExtractRequest, request: Request) -> api.Extracted:
        """An object that fits the JSON Schema, read from the text."""
        name, replica = note(request, *models.find(asked.model, "extractor"))
        row: dict[str, Any] = {"text": asked.input}
        deadline = _Deadline(limits)
        if asked.json_schema is not None:
            async with deadline:
                await schemas.check(asked.json_schema, sandbox)
            if asked.json_schema.get("type", "object") != "object":
                raise Refusal(400, "schema should be that of an object with 'properties'", param="schema")
            row["schema"] = asked.json_schema
        async with deadline:
            found = await replica.call("answer", row)
        return api.Extracted(model=name, data=found["answer"], repaired=found["repaired"])

    @app.post("/v1/vision", tags=["tasks"])
    async def vision(asked: api.VisionRequest, request: Request) -> api.Seen:
        """What a question about one or more images is answered with."""
        name, replica = note(request, *models.find(asked.model, "multimodal_vision"))
        shown = ([asked.image] if asked.image is not None else []) + asked.images
        async with _Deadline(limits):
            encoded = await pictures.read_all(shown, settings.images, sandbox)
            row: dict[str, Any] = {"images": encoded} | ({"question": asked.question} if asked.question else {})
            found = await replica.call("answer", row)
        return api.Seen(model=name, answer=found["answer"], text=found["text"])

    @app.post("/v1/responses", include_in_schema=False)
    async def responses() -> Response:
        raise Refusal(404, f"OpenAI's Responses API is not supported: ask at {CHAT}")

    @app.post("/v1/feedback", tags=["state"])
    async def feedback(asked: api.FeedbackRequest, request: Request) -> api.Recorded:
        """What an answer was worth, or what it should have been. Kept with its request's id, model and endpoint."""
        await journal.keep_feedback(asked, request.state.key, request.state.any_feedback)
        return api.Recorded(request_id=asked.request_id)

    pages.install(app, settings, journal)
    return app


def note(request: Request, name: str, replica: Replica) -> tuple[str, Replica]:
    """The journal counts requests by model."""
    request.state.model, request.state.version = name, replica.name
    request.app.state.journal.began(name)
    return name, replica


class _Deadline:
    """From its making on: what is awaited in it, once or several times, ends with 504 when it is over."""

    def __init__(self, limits: Limits):
        self.seconds = limits.deadline_s
        self.until = asyncio.get_running_loop().time() + limits.deadline_s

    async def __aenter__(self) -> None:
        self.timeout = asyncio.timeout_at(self.until)
        await self.timeout.__aenter__()

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            await self.timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise Refusal(504, f"no answer within {self.seconds:g} s") from None


async def _after(request: Request, first: str, events: AsyncIterator[str], deadline: _Deadline) -> AsyncIterator[str]:
    """The events of a stream. One that fails has sent its head already, and says so in its last event and to the
    journal."""
    event: str | None = first
    try:
        while event is not None:
            yield event
            async with deadline:
                event = await anext(events, None)
    except Refusal as refusal:
        request.state.refused = refusal.status
        yield f"data: {json.dumps(error_form(refusal))}\n\n"


def _charge(request: Request, answers: int, limits: Limits) -> None:
    """Count a request by its answers. Raises Refusal for too many."""
    if answers > limits.answers:
        said = f"prompts times n is {answers:,}; {limits.answers:,} answers are the most of one request"
        raise Refusal(400, said, param="n")
    request.state.charge(answers - 1)


def _address(part: Mapping[str, Any]) -> str:
    match part:
        case {"image_url": {"url": str(address)}}:
            return address
    raise Refusal(400, "content of type image_url should have 'image_url': {'url': …}", param="messages")


def _listed(given: str | Sequence[str], limits: Limits, param: str = "input", may_be_empty: bool = False) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    if len(texts) > limits.texts:
        raise Refusal(400, f"{param} has {len(texts):,} texts; {limits.texts:,} are the most", param=param)
    empty = next((number for number, text in enumerate(texts) if not text.strip()), None)
    if empty is not None and not may_be_empty:
        raise Refusal(400, f"{param}: text {empty} is empty", param=param)
    return texts


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def _(request: Request, error: Refusal) -> Response:
        return refused(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        # Of a field that may be of two types the one that it nearly is comes first.
        first = next((found for found in errors if not found["type"].endswith("_type")), errors[0])
        name, number = [*map(str, first["loc"][1:3]), "", ""][:2]
        place = (f"{name}.{number}" if number.isdigit() else name)[:_SHOWN]
        if first["type"] == "json_invalid":
            return refused(Refusal(400, f"the body is not JSON ({first['ctx']['error']})"))
        message = first["msg"].removeprefix("Value error, ")
        param = name[:_SHOWN] or first.get("ctx", {}).get("field")
        return refused(Refusal(400, f"{place}: {message}" if place else message, param=param))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        message = (
            f"there is no {request.method} {request.url.path[:_SHOWN]}"
            if error.status_code in (404, 405)
            else error.detail
        )
        return refused(Refusal(error.status_code, message))


def _describe(app: FastAPI, keys: bool) -> None:
    """The OpenAPI with the API key, and without FastAPI's own form of validation errors: here they are 400, in
    OpenAI's form."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        described = made()
        described["components"]["schemas"].pop("HTTPValidationError", None)
        described["components"]["schemas"].pop("ValidationError", None)
        bearer = {"type": "http", "scheme": "bearer", "description": "a key of 'srl-rlvr serve --new-key NAME'"}
        described["components"]["securitySchemes"] = {"api_key": bearer}
        described["security"] = [{"api_key": []}] if keys else [{}, {"api_key": []}]
        for path in ("/healthz", "/readyz"):
            described["paths"][path]["get"]["security"] = []
        return described

    app.openapi = openapi
