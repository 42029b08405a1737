"""What holds a model and answers: an encoder, or a writer of text by our own engine (by vLLM: `vllm_writers`).

A writer has `chat` and `complete` (OpenAI's forms; as streams, too) and `answer`, which takes a row as a data file of
its type has it. All raise `Refusal` if a request is at fault. Ray Serve calls them through `Holder`.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.config import ModelEntry
from serve.errors import Refusal
from serve.sandbox import Sandbox, SandboxError
from serve.together import Together
from srl_rlvr import trained
from srl_rlvr.config import EngineConfig
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import InputError
from srl_rlvr.examples.files import InMemory, Reading
from srl_rlvr.policies import chat

if TYPE_CHECKING:
    from srl_rlvr.engines.transformers_engine import TransformersEngine

Tokens = tuple[int, ...]
_LABELS_KEPT = 8
_EMPTY = ("", [], {})
_ONLY_VLLM: dict[str, Sequence[Any]] = {  # beside null, what asks for nothing
    "stop": _EMPTY,
    "logit_bias": _EMPTY,
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
}
_CHECK_S = 5.0  # of a processor, for an answer against its schema
PIECE = 64_000  # characters of a call that are encoded at a time
DEADLINE_S = 30.0  # of any clock, for work in the sandbox on a machine that has other things to do
_SANDBOX_MIB = 2048


def own_thread(work: Callable[..., Any], name: str) -> Callable[..., Awaitable[Any]]:
    """`work`, awaited, always in the same thread: each thread that calls torch has an OpenMP team of its own."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(*arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(executor, functools.partial(work, *arguments))

    return run


@functools.cache
def _sandbox() -> Sandbox:
    """One for all models of this process. Its own processes start when they are needed."""
    return Sandbox(memory_mib=_SANDBOX_MIB)


class Holder:
    """How Ray Serve calls a replica: the name of the model and of the method come first.

    A Refusal is returned, or is the last item of a stream: Ray logs what is raised, and a refusal may have texts of the
    request and of the answer in it.
    """

    def of_model(self, name: str) -> Any:
        return self

    async def on(self, model: str, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self.of_model(model), method)(*arguments)
        except Refusal as refusal:
            return refusal

    async def stream_on(self, model: str, method: str, *arguments: Any) -> AsyncIterator[Any]:
        try:
            async for item in getattr(self.of_model(model), method)(*arguments):
                yield item
        except Refusal as refusal:
            yield refusal


def _characters(texts: Sequence[tuple[str, ...]]) -> int:
    return sum(len(part) for text in texts for part in text)


class Encoder(Holder):
    """Embeddings, reranker and router. Calls that wait while texts are encoded are encoded together."""

    def __init__(self, entry: ModelEntry):
        self.model = trained.read(Path(entry.path), entry.max_context)
        self.tokenizer = self.model.load_tokenizer()
        engine: Any = self.model.open_engine("ranking", EngineConfig())
        self.scorer = engine.scorer
        self.together: Together[Any, Any] = Together(
            own_thread(self._encode_calls, "encoder"), weight=_characters, heaviest=2 * PIECE
        )
        self._labels: dict[tuple[str, ...], np.ndarray] = {}  # vectors of sets of labels, the last used last

    async def ready(self) -> bool:
        return True

    async def many(self, calls: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """What each method returns for its arguments, or its Refusal: one request to this replica for many to it."""
        return await asyncio.gather(*(self.on("", method, *arguments) for method, arguments in calls))

    async def decode(self, texts: Sequence[Sequence[int]]) -> list[str]:
        """Texts of this model's own token ids."""
        size = len(self.tokenizer.tokenizer)
        unknown = next((token for tokens in texts for token in tokens if token >= size), None)
        if unknown is not None:
            raise Refusal(400, f"input: the model's tokenizer has no token {unknown}; it has {size:,}", param="input")
        found = self.tokenizer.tokenizer.batch_decode([list(tokens) for tokens in texts], skip_special_tokens=True)
        empty = next((number for number, text in enumerate(found) if not text.strip()), None)
        if empty is not None:
            raise Refusal(400, f"input: text {empty} is empty", param="input")
        return found

    async def encode(self, texts: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, int]:
        """[texts, D], and how many tokens were read. Other calls are encoded between the pieces of a long one."""
        pieces: list[list[tuple[str, ...]]] = [[]]
        room = PIECE
        for text in texts:
            room -= _characters([text])
            if room < 0 and pieces[-1]:
                pieces.append([])
                room = PIECE - _characters([text])
            pieces[-1].append(text)
        found = [await self.together(piece) for piece in pieces]
        return np.concatenate([vectors for vectors, _ in found]), sum(tokens for _, tokens in found)

    async def embed(self, texts: Sequence[str], dimensions: int | None) -> tuple[np.ndarray, int]:
        """[texts, D] of length 1, and how many tokens were read."""
        vectors, tokens = await self.encode([(text,) for text in texts])
        if dimensions is not None:
            if dimensions > vectors.shape[1]:
                raise Refusal(400, f"dimensions is {dimensions}; this model has {vectors.shape[1]}", param="dimensions")
            vectors = vectors[:, :dimensions]
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors, tokens

    async def rerank(self, query: str, documents: Sequence[str]) -> tuple[np.ndarray, int]:
        """Of each document how relevant it is, in [0, 1], and how many tokens were read; a model that was trained so
        takes them to come in the order of a search."""
        from srl_rlvr.policies.ranking import ORDER

        outputs, tokens = await self.encode([(query, document) for document in documents])
        logits = outputs[:, 0].astype(np.float64)
        if self.model.card.get("ordered"):
            logits -= ORDER * np.log(np.arange(1, len(documents) + 1))
        return 1 / (1 + np.exp(-logits)), tokens

    async def route(
        self, texts: Sequence[str], labels: Mapping[str, str] | None, top_n: int
    ) -> list[tuple[str | None, float, list[tuple[str, float]]]]:
        """(label, confidence, [(label, probability)]) of each text; None is out of scope."""
        from srl_rlvr.model_types import intent_router
        from srl_rlvr.policies.ranking import SCALE

        known = labels or self.model.card["labels"]
        names, of_labels = list(known), await self._encode_labels(tuple(known.values()))
        vectors, _ = await self.encode([(text,) for text in texts])
        logits = SCALE * vectors @ of_labels.T
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = odds / odds.sum(axis=1, keepdims=True)
        calibration = {} if labels else self.model.card.get("calibration", {})
        found = []
        for row in probabilities:
            order = np.argsort(-row, kind="stable")[:top_n]
            confidence, label = float(row[order[0]]), names[order[0]]
            if calibration:
                confidence = float(intent_router.confidences(row[order[:1]], calibration)[0])
            in_scope = confidence >= calibration.get("threshold", 0.0)
            alternatives = [(names[number], float(row[number])) for number in order]
            found.append((label if in_scope else None, confidence, alternatives))
        return found

    def tokenize(self, *texts: tuple[str, ...]) -> list[Tokens]:
        return self.tokenizer.encode_many(texts)

    async def _encode_labels(self, texts: tuple[str, ...]) -> np.ndarray:
        found = self._labels.pop(texts, None)
        if found is None:
            found, _ = await self.encode([(text,) for text in texts])
        self._labels[texts] = found
        while len(self._labels) > _LABELS_KEPT:
            del self._labels[next(iter(self._labels))]
        return found

    def encode_now(self, texts: Sequence[Tokens]) -> np.ndarray:
        """[texts, D], each text once."""
        unique = sorted(set(texts), key=lambda text: (-len(text), text))
        outputs = self.scorer.encode(unique).cpu().numpy()
        row_of = {text: row for row, text in enumerate(unique)}
        return outputs[[row_of[text] for text in texts]]

    def _encode_calls(self, calls: list[Sequence[tuple[str, ...]]]) -> list[tuple[np.ndarray, int]]:
        """[texts, D] of each call, and how many tokens were read."""
        tokens = self.tokenize(*(text for call in calls for text in call))
        outputs = self.encode_now(tokens)
        ends = list(itertools.accumulate(map(len, calls)))
        spans = zip([0, *ends], ends, strict=False)
        return [(outputs[begin:end], sum(map(len, tokens[begin:end]))) for begin, end in spans]


@dataclass(frozen=True)
class Wanted:
    """What a writer is to write."""

    tokens: Tokens
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    images: tuple[bytes, ...] = ()
    schema: str = ""  # JSON Schema that the text is to fit, where the engine can see to it


class Writer(Holder):
    """What both writers have in common: rows of their type in, what it makes of the text out."""

    def __init__(self, entry: ModelEntry):
        self.model = trained.read(Path(entry.path), entry.max_context, entry.max_tokens)
        self.tokenizer = self.model.load_tokenizer()
        self.sandbox = _sandbox()
        self.read_row = own_thread(self._read_row, "reader")

    async def ready(self) -> bool:
        return True

    def instructed(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The conversation with the instruction that the model was trained under, if it has none of its own. Raises
        Refusal if the model cannot read a part of it."""
        self._check_parts(messages)
        if any(message["role"] in ("system", "developer") for message in messages):
            return list(messages)
        model_type: Any = self.model.model_type
        return [{"role": "system", "content": model_type.system(self.model.think)}, *messages]

    def _check_parts(self, messages: Sequence[Mapping[str, Any]]) -> None:
        readable = ("text", "image_url") if hasattr(self.tokenizer, "processor") else ("text",)
        for number, message in enumerate(messages):
            content = message.get("content") or ""
            for part in () if isinstance(content, str) else content:
                where, kind = f"messages.{number}.content", part.get("type")
                if kind not in readable:
                    shown = str(kind)[:40]
                    raise Refusal(400, f"{where}: this model reads no content of type '{shown}'", param="messages")
                if kind == "text" and not isinstance(part.get("text"), str):
                    raise Refusal(400, f"{where}: content of type text should have 'text'", param="messages")

    async def answer(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"answer", "text", "repaired"}: `row` is one of a data file without its answer."""
        example, tokens, schema = await self.read_row(row)
        text = await self.write(
            Wanted(
                tuple(tokens), self._room(tokens), images=tuple(example["images"]),
                schema=json.dumps(schema) if schema else "",
            )
        )  # fmt: skip
        text, repaired = await self.fitted(text, schema) if schema else (text, False)
        answer = self.model.model_type.present(example, {"text": text}, self.model.card)
        return {"answer": answer, "text": text, "repaired": repaired}

    def _read_row(self, row: dict[str, Any]) -> tuple[Any, list[int], dict[str, Any] | None]:
        """The example, its prompt, and the schema of its answer."""
        model_type = self.model.model_type
        try:
            how = Reading(card=self.model.card, unanswered=True)
            [example] = model_type.load(InMemory([row]), "dev", how).to_pylist()
            tokens = model_type.encode_prompt(self.tokenizer, example, self.model.think)
        except InputError as error:
            raise Refusal(400, str(error).removeprefix("request, row 1: ")) from None
        return example, list(tokens), model_type.answer_schema(example)

    async def fitted(self, text: str, schema: Mapping[str, Any]) -> tuple[str, bool]:
        """See `answers.repaired`."""
        try:
            found, repaired = await self.sandbox.run(
                "serve.answers:repaired", text, schema, deadline_s=DEADLINE_S, processor_s=_CHECK_S
            )
        except (TimeoutError, SandboxError):
            raise Refusal(
                400, f"the answer could not be checked against the schema in {_CHECK_S:g} s of a processor: simplify "
                "the schema", param="schema",
            ) from None  # fmt: skip
        return found, repaired

    async def write(self, wanted: Wanted) -> str:
        raise NotImplementedError

    def _room(self, tokens: Sequence[int], asked: int | None = None) -> int:
        """For the answer. Raises Refusal where the prompt fills the context."""
        left = self.model.max_context - len(tokens)
        if left < 1:
            raise Refusal(
                400, f"the prompt has {len(tokens)} tokens and this model's context is {self.model.max_context}",
                "context_length_exceeded",
            )  # fmt: skip
        return min(left, asked or self.model.max_tokens)


class PlainWriter(Writer):
    """Our own engine over transformers' models: types with images, and where vLLM is not installed. It writes whole
    answers: a stream of one has a single piece of text."""

    def __init__(self, entry: ModelEntry):
        super().__init__(entry)
        options = EngineConfig(kv_cache_gib=entry.kv_cache_gib, max_running=entry.max_running)
        engine: Any = self.model.open_engine("transformers", options)
        self.engine: TransformersEngine = engine
        self.sample: Together[Wanted, tuple[str, int, str]] = Together(own_thread(self._sample, "writer"))
        self.read_conversation = own_thread(self._conversation, "reader")
        self.read_texts = own_thread(lambda texts: list(map(self._plain_tokenizer.encode, texts)), "reader")

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        _check_supported(body)
        tokens, images = await self.read_conversation(body["messages"])
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        written = await self._generate(body, tokens, images, asked)
        choices = [
            {"index": number, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
            for number, (text, _, reason) in enumerate(written)
        ]
        return self._form("chat.completion", body, choices, len(tokens), sum(count for _, count, _ in written))

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        _check_supported(body)
        prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
        for prompt in prompts:
            self._check_text(prompt, "prompt")
        tokens = await self.read_texts(prompts)
        groups = await asyncio.gather(*(self._generate(body, of, [], body.get("max_tokens")) for of in tokens))
        written = [answer for group in groups for answer in group]
        choices = [
            {"index": number, "text": text, "finish_reason": reason} for number, (text, _, reason) in enumerate(written)
        ]
        read = sum(map(len, tokens))
        return self._form("text_completion", body, choices, read, sum(count for _, count, _ in written))

    async def chat_stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        whole = await self.chat(body)
        usage = whole.pop("usage")
        for choice in whole["choices"]:
            pieces = [(choice["message"], None), ({}, choice["finish_reason"])]
            for delta, reason in pieces:
                piece = {"index": choice["index"], "delta": delta, "finish_reason": reason}
                yield _event(whole | {"object": "chat.completion.chunk", "choices": [piece]})
        if (body.get("stream_options") or {}).get("include_usage"):
            yield _event(whole | {"object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    async def complete_stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        yield _event(await self.complete(body))
        yield "data: [DONE]\n\n"

    async def write(self, wanted: Wanted) -> str:
        return (await self.sample(wanted))[0]

    @property
    def _plain_tokenizer(self) -> Any:
        processor = getattr(self.tokenizer, "processor", None)
        return self.tokenizer if processor is None else processor.tokenizer

    def _check_text(self, text: str, param: str) -> None:
        """Raises Refusal where it has the token in it that stands for images."""
        processor = getattr(self.tokenizer, "processor", None)
        if processor is not None and processor.image_token in text:
            said = f"{param}: a text has {processor.image_token} in it, which stands for images"
            raise Refusal(400, said, param=param)

    def _conversation(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bytes]]:
        """Its tokens and its images, in order. A text model's contents are texts."""
        processor = getattr(self.tokenizer, "processor", None)
        images: list[bytes] = []
        shown = []
        for message in self.instructed(messages):
            content = message.get("content") or ""
            parts: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
            told: list[dict[str, Any]] = []
            for part in parts:
                if part["type"] == "text":
                    self._check_text(part["text"], "messages")
                    told.append({"type": "text", "text": part["text"]})
                else:
                    images.append(base64.b64decode(part["image_url"]["url"].partition(",")[2]))
                    told.append({"type": "image"})
            together: Any = told if processor is not None else "".join(part["text"] for part in told)
            shown.append({"role": message["role"], "content": together})
        try:
            if processor is None:
                return chat.prompt_ids(self.tokenizer, shown, self.model.think), images
            text = chat.render(processor, shown, self.model.think)
        except InputError as error:
            raise Refusal(400, str(error), param="messages") from None
        from PIL import Image

        from srl_rlvr import images as encoded

        blank = [Image.new("RGB", encoded.size(image)) for image in images] or None
        return list(processor(text=text, images=blank, add_special_tokens=False)["input_ids"][0]), images

    async def _generate(
        self, body: Mapping[str, Any], tokens: Sequence[int], images: Sequence[bytes], asked: int | None
    ) -> list[tuple[str, int, str]]:
        """(text, tokens, why it ends) of each of the `n` answers."""
        temperature = 1.0 if body.get("temperature") is None else float(body["temperature"])
        seed = time.time_ns() if body.get("seed") is None else body["seed"]
        schema, room = response_schema(body.get("response_format")), self._room(tokens, asked)
        wanted = [
            Wanted(tuple(tokens), room, temperature, (seed + number) % 2**32, tuple(images))
            for number in range(body.get("n") or 1)
        ]
        written = await asyncio.gather(*map(self.sample, wanted))
        if schema is None:
            return list(written)
        return [((await self.fitted(text, schema))[0], count, reason) for text, count, reason in written]

    def _sample(self, calls: list[Wanted]) -> list[Any]:
        """(text, tokens, why it ends) of each, or its Refusal; those that want alike are written together."""
        found: list[Any] = [None] * len(calls)
        alike: dict[SamplingSpec, list[int]] = {}
        for number, call in enumerate(calls):
            alike.setdefault(SamplingSpec(1, call.temperature, call.max_tokens), []).append(number)
        for spec, numbers in alike.items():
            prompts = [list(calls[number].tokens) for number in numbers]
            images = [list(calls[number].images) for number in numbers]
            try:
                groups = self.engine.sample(
                    prompts, spec, images if any(images) else (), seeds=[calls[number].seed for number in numbers]
                )
            except InputError as error:
                for number in numbers:
                    found[number] = Refusal(400, str(error))
                continue
            for number, [completion] in zip(numbers, groups, strict=True):
                text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                found[number] = text, len(completion.token_ids), completion.finish_reason
        return found

    def _form(
        self, kind: str, body: Mapping[str, Any], choices: list[dict[str, Any]], prompt_tokens: int, written: int
    ) -> dict[str, Any]:
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        return {
            "id": f"{prefix}-{body['request_id']}",
            "object": kind,
            "created": int(time.time()),
            "model": body["model"],
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": written,
                "total_tokens": prompt_tokens + written,
            },
        }


def _check_supported(body: Mapping[str, Any]) -> None:
    """Raises Refusal if the request asks for what only vLLM does."""
    unknown = next((name for name, neutral in _ONLY_VLLM.items() if _asks(body.get(name), neutral)), None)
    if unknown is not None:
        raise Refusal(400, f"'{unknown}' is not supported for this model: leave it out", param=unknown)


def _asks(value: Any, neutral: Sequence[Any]) -> bool:
    """Whether the value is none of these, and not None."""
    alike = (one for one in neutral if isinstance(one, bool) is isinstance(value, bool))  # Python takes True for 1
    return value is not None and value not in alike


def response_schema(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The JSON Schema that an answer is to fit; None where it may be any text."""
    match response_format:
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return schema
        case {"type": "json_object"}:
            return {"type": "object"}
        case None | {"type": "text"}:
            return None
    raise Refusal(400, "response_format should be text, json_object, or json_schema with its 'schema'",
                  param="response_format")  # fmt: skip


def _event(piece: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"
