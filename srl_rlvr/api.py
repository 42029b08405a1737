"""What requests and answers over HTTP look like: the forms that the gateway checks and documents, and that `Client`
returns. Chat, completions, embeddings and models are OpenAI's, rerank is Cohere's and Jina's; the rest is ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class Identified(Answer):
    @property
    def request_id(self) -> str:
        """As its header has it; `Client` puts it in."""
        return (self.__pydantic_extra__ or {}).get("request_id", "")


class Request(BaseModel):
    """Fields that are not named are ignored, as OpenAI's servers do."""

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _writable(cls, data: Any) -> Any:
        for text in _texts(data):
            if "\0" in text:
                raise ValueError("a text holds a NUL character")
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError("a text holds half of a surrogate pair, which is no character")
        return data


def _texts(data: Any) -> Iterator[str]:
    waiting = [data]
    while waiting:
        match waiting.pop():
            case str() as text:
                yield text
            case list() as items:
                waiting.extend(items)
            case dict() as fields:
                waiting.extend((*fields.keys(), *fields.values()))


Texts = str | Annotated[list[str], Field(min_length=1)]
Model = Annotated[str | None, Field(description="the only model of this type where it is left out")]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """OpenAI's form."""

    error: ErrorBody


class Usage(Answer):
    prompt_tokens: int = 0
    total_tokens: int = 0


class ModelInfo(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "srl-rlvr"
    model_type: str
    kind: Annotated[str, Field(description="the type whose endpoint answers for it: its own, or one like it")] = ""


class Models(Identified):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: Literal["system", "user", "assistant", "developer", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class Generation(Request):
    """What chat and completions have in common. Other fields go to the engine as they are."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool | None = False
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    n: Annotated[int | None, Field(ge=1, le=16)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: str | list[str] | None = None
    response_format: dict[str, Any] | None = None


class ChatRequest(Generation):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None


class CompletionRequest(Generation):
    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]


class Generated(Identified):
    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any] | None = None


class EmbeddingsRequest(Request):
    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int | None, Field(ge=1)] = None


class Embedding(Answer):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: Annotated[list[float] | str, Field(description="numbers, or little-endian float32 in base64")]


class Embeddings(Identified):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Document(BaseModel):
    model_config = ConfigDict(extra="allow")
    text: str


class RerankRequest(Request):
    model: Model = None
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str | Document], Field(min_length=1)]
    top_n: Annotated[int | None, Field(ge=1)] = None
    return_documents: bool = False


class Ranked(Answer):
    index: int
    relevance_score: float
    document: Document | None = None


class Reranked(Identified):
    id: str
    model: str
    results: list[Ranked]
    meta: dict[str, Any] = {"api_version": {"version": "2"}}
    usage: Usage


class RouteRequest(Request):
    model: Model = None
    input: Texts
    top_n: Annotated[int, Field(ge=1, le=100)] = 5
    labels: Annotated[
        dict[str, str] | None,
        Field(min_length=1, description="names and descriptions, instead of those that the model was trained on"),
    ] = None


class Alternative(Answer):
    label: str
    confidence: float


class Route(Answer):
    index: int
    label: Annotated[str | None, Field(description="null: out of scope")]
    confidence: float
    out_of_scope: bool
    alternatives: list[Alternative]


class Routes(Identified):
    object: Literal["list"] = "list"
    model: str
    data: list[Route]


class ParseRequest(Request):
    model: Model = None
    input: Texts


class Span(Answer):
    """Characters `start` to `end` of the text; null where it is not in there as it was written."""

    text: str
    start: int | None = None
    end: int | None = None


class Role(Span):
    role: str


class Frame(Answer):
    predicate: Span
    roles: list[Role]


class Parse(Answer):
    index: int
    frames: list[Frame]


class Parses(Identified):
    object: Literal["list"] = "list"
    model: str
    data: list[Parse]


class ExtractRequest(Request):
    model: Model = None
    input: Annotated[str, Field(min_length=1)]
    json_schema: Annotated[
        dict[str, Any] | None, Field(alias="schema", description="the model's own where it is left out")
    ] = None


class Extracted(Identified):
    model: str
    data: dict[str, Any]
    repaired: Annotated[bool, Field(description="the model's text was no JSON, and was made into some")] = False


class VisionRequest(Request):
    model: Model = None
    image: Annotated[str | None, Field(description="base64, a data: address, or an http(s) one where allowed")] = None
    images: list[str] = []
    question: Annotated[str | None, Field(description="the model's own where it is left out")] = None

    @model_validator(mode="after")
    def _shown(self) -> VisionRequest:
        if self.image is None and not self.images:
            raise ValueError("there should be 'image' or 'images'")
        return self


class Seen(Identified):
    model: str
    answer: Any
    text: str


class FeedbackRequest(Request):
    request_id: Annotated[str, Field(min_length=1, max_length=200)]
    reward: Annotated[float | None, Field(ge=-1, le=1)] = None
    correction: Any = None
    comment: Annotated[str | None, Field(max_length=10_000)] = None

    @model_validator(mode="after")
    def _says_something(self) -> FeedbackRequest:
        if self.reward is None and self.correction is None and not (self.comment or "").strip():
            raise ValueError("there should be 'reward', 'correction' or 'comment'")
        return self


class Recorded(Answer):
    request_id: str
    recorded: bool = True


class Health(Answer):
    status: str
