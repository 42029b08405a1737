"""What holds a model and answers: an encoder, or a writer of text by our own engine (by vLLM: `vllm_writers`).

A writer has `chat` and `complete` (OpenAI's forms; as streams, too) and `answer`, which takes a row as a data file of
its type has it. All raise `Refusal` where a request is at fault.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.config import ModelEntry
from serve.errors import Refusal
from serve.together import Together
from srl_rlvr import trained
from srl_rlvr.config import EngineConfig
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.errors import InputError
from srl_rlvr.examples.files import InMemory, Reading
from srl_rlvr.verifiers.answers import without_thoughts
from srl_rlvr.verifiers.structures import read_json, validator

Tokens = tuple[int, ...]
_LABELS_KEPT = 8
_EMPTY = ("", [], {})
_ONLY_VLLM: dict[str, Sequence[Any]] = {  # beside null, what asks for nothing
    "stop": _EMPTY,
    "tools": _EMPTY,
    "logit_bias": _EMPTY,
    "top_p": (1,),
    "logprobs": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
}


class Encoder:
    """Embeddings, reranker and router. Calls that wait while texts are encoded are encoded together."""

    def __init__(self, entry: ModelEntry):
        self.model = trained.read(Path(entry.path), entry.max_context)
        self.tokenizer = self.model.load_tokenizer()
        engine: Any = self.model.open_engine("ranking", EngineConfig())
        self.scorer = engine.scorer
        self.encode = Together(functools.partial(asyncio.to_thread, self._encode_calls))
        self._labels: dict[tuple[str, ...], np.ndarray] = {}  # vectors of sets of labels, the last used last

    async def ready(self) -> bool:
        return True

    async def many(self, calls: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """What each method returns for its arguments, or its Refusal: one request to this replica for many to it."""

        async def one(method: str, arguments: tuple[Any, ...]) -> Any:
            try:
                return await getattr(self, method)(*arguments)
            except Refusal as refusal:
                return refusal

        return await asyncio.gather(*(one(*call) for call in calls))

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


class Writer:
    """What both writers have in common: rows of their type in, what it makes of the text out."""

    def __init__(self, entry: ModelEntry):
        self.model = trained.read(Path(entry.path), entry.max_context, entry.max_tokens)
        self.tokenizer = self.model.load_tokenizer()

    async def ready(self) -> bool:
        return True

    def instructed(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The conversation with the instruction that the model was trained under, where it has none of its own."""
        if any(message["role"] in ("system", "developer") for message in messages):
            return list(messages)
        model_type: Any = self.model.model_type
        return [{"role": "system", "content": model_type.system(self.model.think)}, *messages]

    async def answer(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"answer", "text", "repaired"}: `row` is one of a data file without its answer."""
        model_type, card = self.model.model_type, self.model.card
        try:
            how = Reading(card=card, unanswered=True)
            [example] = model_type.load(InMemory([row]), "dev", how).to_pylist()
            tokens = model_type.encode_prompt(self.tokenizer, example, self.model.think)
        except InputError as error:
            raise Refusal(400, str(error).removeprefix("request, row 1: ")) from None
        schema = model_type.answer_schema(example)
        text = await self.write(
            Wanted(
                tuple(tokens), self._room(tokens), images=tuple(example["images"]),
                schema=json.dumps(schema) if schema else "",
            )
        )  # fmt: skip
        text, repaired = _repaired(text, schema) if schema else (text, False)
        answer = model_type.present(example, {"text": text}, card)
        return {"answer": answer, "text": text, "repaired": repaired}

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
        self.engine = self.model.open_engine("transformers", options)
        self.sample: Together[Wanted, tuple[str, int, str]] = Together(
            functools.partial(asyncio.to_thread, self._sample)
        )

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens, images = self._conversation(self.instructed(body["messages"]))
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        text, count, reason = await self._generate(body, tokens, images, asked)
        message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        return self._form("chat.completion", body, message, len(tokens), count)

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(body["prompt"], str):
            raise Refusal(400, "this model completes one prompt at a time: 'prompt' should be text", param="prompt")
        self._check_text(body["prompt"], "prompt")
        tokens = self._plain_tokenizer.encode(body["prompt"])
        text, count, reason = await self._generate(body, tokens, [], body.get("max_tokens"))
        return self._form(
            "text_completion", body, {"index": 0, "text": text, "finish_reason": reason}, len(tokens), count
        )

    async def chat_stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        whole = await self.chat(body)
        usage, [choice] = whole.pop("usage"), whole["choices"]
        pieces = [({"role": "assistant", "content": choice["message"]["content"]}, None), ({}, choice["finish_reason"])]
        for delta, reason in pieces:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            yield _event(whole | {"object": "chat.completion.chunk", "choices": [choice]})
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
        for message in messages:
            content = message.get("content") or ""
            parts: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
            told: list[dict[str, Any]] = []
            for part in parts:
                if part.get("type") == "text" and isinstance(part.get("text"), str):
                    self._check_text(part["text"], "messages")
                    told.append({"type": "text", "text": part["text"]})
                elif part.get("type") == "image_url" and processor is not None:
                    images.append(base64.b64decode(part["image_url"]["url"].partition(",")[2]))
                    told.append({"type": "image"})
                else:
                    raise Refusal(400, f"this model reads no content of type '{part.get('type')}'", param="messages")
            together: Any = told if processor is not None else "".join(part["text"] for part in told)
            shown.append({"role": message["role"], "content": together})
        if processor is None:
            return list(
                self.tokenizer.apply_chat_template(shown, add_generation_prompt=True, return_dict=False)
            ), images
        from PIL import Image

        from srl_rlvr import images as encoded

        text = processor.apply_chat_template(shown, add_generation_prompt=True)
        blank = [Image.new("RGB", encoded.size(image)) for image in images] or None
        return list(processor(text=text, images=blank, add_special_tokens=False)["input_ids"][0]), images

    async def _generate(
        self, body: Mapping[str, Any], tokens: Sequence[int], images: Sequence[bytes], asked: int | None
    ) -> tuple[str, int, str]:
        if (body.get("n") or 1) != 1:
            raise Refusal(400, "this model writes one answer at a time: 'n' should be 1", param="n")
        unknown = next((name for name, neutral in _ONLY_VLLM.items() if _asks(body.get(name), neutral)), None)
        if unknown is not None:
            raise Refusal(400, f"'{unknown}' is not to be had here: our own engine runs this model", param=unknown)
        temperature = 1.0 if body.get("temperature") is None else float(body["temperature"])
        seed = body.get("seed")
        wanted = Wanted(
            tuple(tokens), self._room(tokens, asked), temperature,
            seed % 2**32 if seed is not None else time.time_ns() % 2**32, tuple(images),
        )  # fmt: skip
        schema = response_schema(body.get("response_format"))
        text, count, reason = await self.sample(wanted)
        return (_repaired(text, schema)[0] if schema is not None else text), count, reason

    def _sample(self, calls: list[Wanted]) -> list[Any]:
        """(text, tokens, why it ends) of each, or its Refusal; those that want alike are written together."""
        found: list[Any] = [None] * len(calls)
        alike: dict[SamplingSpec, list[int]] = {}
        for number, call in enumerate(calls):
            spec = SamplingSpec(1, call.temperature, call.max_tokens, seed=call.seed if call.temperature else 0)
            alike.setdefault(spec, []).append(number)
        for spec, numbers in alike.items():
            prompts = [list(calls[number].tokens) for number in numbers]
            images = [list(calls[number].images) for number in numbers]
            try:
                groups = self.engine.sample(prompts, spec, images if any(images) else ())
            except InputError as error:
                for number in numbers:
                    found[number] = Refusal(400, str(error))
                continue
            for number, [completion] in zip(numbers, groups, strict=True):
                text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                found[number] = text, len(completion.token_ids), completion.finish_reason
        return found

    def _form(
        self, kind: str, body: Mapping[str, Any], choice: dict[str, Any], prompt_tokens: int, written: int
    ) -> dict[str, Any]:
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        return {
            "id": f"{prefix}-{body['request_id']}",
            "object": kind,
            "created": int(time.time()),
            "model": body["model"],
            "choices": [choice],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": written,
                "total_tokens": prompt_tokens + written,
            },
        }


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


def _repaired(text: str, schema: Mapping[str, Any]) -> tuple[str, bool]:
    """JSON that fits the schema, and whether the text was not. Raises Refusal where none can be made of it."""
    from jsonschema.exceptions import ValidationError
    from partial_json_parser import loads
    from referencing.exceptions import Unresolvable

    text = without_thoughts(text)
    begin = min((at for at in (text.find("{"), text.find("[")) if at >= 0), default=0)
    try:
        try:
            found, repaired = read_json(text), False
        except ValueError:
            found, repaired = read_json(json.dumps(loads(text[begin:]))), True
        validator(schema).validate(found)
    except Unresolvable as error:
        raise Refusal(400, f"schema refers to '{error.ref[:100]}', which is not in it", param="schema") from None
    except (ValueError, RecursionError):
        raise Refusal(422, f"the model's answer is no JSON: {text[:200]!r}", "invalid_answer") from None
    except ValidationError as error:
        said = f"the model's answer does not fit the schema ({error.message[:200]}): {text[:200]!r}"
        raise Refusal(422, said, "invalid_answer") from None
    return (json.dumps(found, ensure_ascii=False) if repaired else text), repaired


def _event(piece: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"
