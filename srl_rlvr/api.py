"""What requests and answers over HTTP look like: the forms that the gateway checks and documents, and that `Client`
returns. Chat, completions, embeddings and models are OpenAI's, rerank is Cohere's and Jina's; the rest is ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

_SURROGATE = re.compile("[\ud800-\udfff]")


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class Identified(Answer):
    @property
    def request_id(self) -> str:
        """As its header has it; `Client` puts it in."""
        return (self.__pydantic_extra__ or {}).get("request_id", "")


class Request(BaseModel):
    """Null stands for a field that is not given. Fields that are not named are ignored."""

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, data: Any) -> Any:
        for text in _texts(data):
            if "\0" in text:
                raise ValueError("a text holds a NUL character")
            if not text.isascii() and _SURROGATE.search(text):
                raise ValueError("a text holds half of a surrogate pair, which is no character")
        return cls._given(data) if isinstance(data, dict) else data

    @classmethod
    def _given(cls, data: dict[str, Any]) -> dict[str, Any]:
        required = {field.alias or name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: value for name, value in data.items() if value is not None or name in required}


_DEEPEST = 100  # levels of a request's JSON; what recurses over it (Python's pickle does) ends at about 300


def _texts(data: Any) -> Iterator[str]:
    waiting = [(data, 0)]
    while waiting:
        found, level = waiting.pop()
        if level > _DEEPEST:
            raise ValueError(f"the JSON is nested too deeply; {_DEEPEST} levels are the most")
        match found:
            case str() as text:
                yield text
            case list() as items:
                waiting.extend((item, level + 1) for item in items)
            case dict() as fields:
                waiting.extend((each, level + 1) for pair in fields.items() for each in pair)


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
    """Other fields come back from clients with the answers that they were given, and are ignored."""

    role: Literal["system", "user", "assistant", "developer", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and self.role not in ("assistant", "function"):
            raise ValueError(f"the content of a message of role '{self.role}' is null; send text")
        return self


class StreamOptions(BaseModel):
    include_usage: bool | None = None


NoEffect = Annotated[Any, Field(exclude=True, description="accepted; has no effect")]

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # fields of OpenAI's, with the values that ask for nothing
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": ({},),
    "suffix": ("",),
    "best_of": (1,),
}
_OF_TOOLS = ("tools", "tool_choice", "functions", "function_call")
_STOPS, _LONGEST_STOP = 4, 1000
_BIASED_TOKENS = 300


class Generation(Request):
    """What chat and completions have in common. Every other field is refused, unless it is null."""

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31, description="-1 or 0: all tokens")] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10)] = None
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, Field(max_length=_BIASED_TOKENS)
    ] = None
    n: Annotated[int | None, Field(ge=1, le=16)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: str | list[str] | None = None
    response_format: dict[str, Any] | None = None
    user: NoEffect = None
    metadata: NoEffect = None
    service_tier: NoEffect = None
    safety_identifier: NoEffect = None
    prompt_cache_key: NoEffect = None
    prompt_cache_retention: NoEffect = None

    @classmethod
    def _given(cls, data: dict[str, Any]) -> dict[str, Any]:
        found = super()._given(data)
        if "none" in (found.get("tool_choice"), found.get("function_call")):  # tools that are not to be called
            found = {name: value for name, value in found.items() if name not in _OF_TOOLS}
        for name, value in list(found.items()):
            if name in _UNSUPPORTED:
                if not any(value == one and type(value) is type(one) for one in _UNSUPPORTED[name]):
                    what = "tool calling" if name in _OF_TOOLS else f"'{name}'"
                    raise _refused(name, f"{what} is not supported: leave out '{name}'")
                del found[name]
            elif name not in cls.model_fields:
                shown = name if len(name) <= 100 else f"{name[:100]}…"
                raise _refused(shown, f"'{shown}' is not a field of this endpoint: leave it out")
        return found

    @field_validator("stop", mode="before")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        if value in ("", []):
            return None
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("it should be a text or a list of texts")
        if len(texts) > _STOPS:
            raise ValueError(f"there are {len(texts):,} texts; {_STOPS} are the most")
        if not all(0 < len(text) <= _LONGEST_STOP for text in texts):
            raise ValueError(f"each text should have 1 to {_LONGEST_STOP:,} characters")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _of_tokens(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in value or ()):
            raise ValueError("each key should be a token id")
        return value


def _refused(field: str, message: str) -> PydanticCustomError:
    """The gateway names `field` as the error's `param`."""
    return PydanticCustomError("refused_field", "{said}", {"said": message, "field": field})


class ChatRequest(Generation):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    parallel_tool_calls: NoEffect = None
    reasoning_effort: NoEffect = None
    verbosity: NoEffect = None

    @model_validator(mode="after")
    def _logprobs_for_top(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        return self


class CompletionRequest(Generation):
    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=0, description="0 is for 'echo' alone")] = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        if _holds_token_ids(value):
            raise ValueError("token ids are not read here: send text")
        return value

    @model_validator(mode="after")
    def _writes_something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("'max_tokens' is 0: it should be 1 or more, or 'echo' true")
        return self


def _holds_token_ids(value: Any) -> bool:
    of_first = value[0] if isinstance(value, list) and value else None
    return isinstance(of_first, int | list)


class Generated(Identified):
    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any] | None = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class EmbeddingsRequest(Request):
    model: str
    input: Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    tokenizer: Annotated[str | None, Field(description="of token ids in 'input': the model's own name")] = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int | None, Field(ge=1)] = None

    @field_validator("input", mode="before")
    @classmethod
    def _readable_input(cls, value: Any) -> Any:
        whole = isinstance(value, list) and not isinstance(value, str)
        if whole and _holds_token_ids(value) and len({type(item) for item in value}) > 1:
            raise ValueError("it should be a text, a list of texts, or lists of token ids")
        return value

    @model_validator(mode="after")
    def _known_ids(self) -> EmbeddingsRequest:
        """Ids of another tokenizer cannot be told from the model's own: the client has to say whose they are."""
        if _holds_token_ids(self.input) and self.tokenizer != self.model:
            raise _refused(
                "input",
                "input holds token ids: send texts (LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False)), or "
                "the model's name as 'tokenizer' if the ids are of its own tokenizer",
            )
        return self


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
