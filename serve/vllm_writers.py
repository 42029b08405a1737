"""Writers of text in vLLM's asynchronous engine: a model in its own, or adapters of one base together in one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from serve.config import ModelEntry
from serve.errors import Refusal
from serve.replicas import DEADLINE_S, Holder, Wanted, Writer, own_thread, response_schema
from serve.sandbox import SandboxError
from srl_rlvr import trained
from srl_rlvr.errors import InputError
from srl_rlvr.policies import chat

log = logging.getLogger(__name__)

# vLLM's own logging closes every handler that is there, Ray Serve's too: when Ray Serve's controller recovers from a
# crash, it then takes the replica for broken and starts it anew.
_LOGGING = {"VLLM_CONFIGURE_LOGGING": "0"}
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM has room for
_ADAPTERS_AT_HAND = 8  # beside the layers at a time; vLLM changes them as requests come
_FAILED = 'data: {"error":'  # how a stream of vLLM's begins to say so
_INTERNAL = re.compile(r"--\w|(?:^|[\s'\"`(])~?/\w")  # options of vLLM's command, and paths
_LOOKS_EVERY_S = 0.2
_GRAMMAR_S = 2.0  # of a processor, to compile one; vLLM then takes as long again, and other new schemas wait for that
_GRAMMARS_KEPT = 256


class VllmEngine:
    """vLLM's engine with its own OpenAI server's handling of requests. `entry` says how it runs."""

    def __init__(self, model: str, entry: ModelEntry, max_context: int, adapters: Mapping[str, Path] | None = None):
        import torch

        from srl_rlvr.engines import vllm_engine

        for name, value in vllm_engine.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ.update(_LOGGING)  # read when vLLM is imported
        logging.getLogger("vllm").setLevel(logging.ERROR)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
        from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
        from vllm.entrypoints.openai.models.protocol import BaseModelPath, LoRAModulePath
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels
        from vllm.renderers.online_renderer import OnlineRenderer
        from vllm.v1.engine.async_llm import AsyncLLM

        on_cpu = not torch.cuda.is_available()
        options: dict[str, Any] = {}
        if on_cpu:
            options = {"enforce_eager": True, "kv_cache_memory_bytes": int(entry.kv_cache_gib * 2**30)}
        if adapters:
            rank = max(json.loads((folder / "adapter_config.json").read_text())["r"] for folder in adapters.values())
            options |= {
                "enable_lora": True,
                "max_loras": min(len(adapters), _ADAPTERS_AT_HAND),
                "max_lora_rank": next(room for room in _RANKS if room >= rank),
            }
        arguments = AsyncEngineArgs(
            model=model,
            dtype="float32" if on_cpu else "bfloat16",
            max_model_len=max_context,
            max_num_seqs=entry.max_running,
            enable_prefix_caching=True,
            structured_outputs_config={"backend": "xgrammar"},  # type: ignore[arg-type]
            disable_log_stats=True,
            **options,
        )
        self.engine = AsyncLLM.from_engine_args(arguments)
        self.models = OpenAIServingModels(
            engine_client=self.engine,
            base_model_paths=[BaseModelPath(name=model if adapters else entry.name, model_path=model)],
            lora_modules=[LoRAModulePath(name, str(folder)) for name, folder in (adapters or {}).items()],
        )
        renderer = OnlineRenderer(
            model_config=self.engine.model_config,
            renderer=self.engine.renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
        )
        common: dict[str, Any] = {"online_renderer": renderer, "request_logger": None}
        self.chat = OpenAIServingChat(
            self.engine, self.models, "assistant", chat_template=None, chat_template_content_format="auto", **common
        )
        self.completion = OpenAIServingCompletion(self.engine, self.models, **common)
        self._loading: asyncio.Task[None] | None = None
        self._grammars: dict[bytes, str | Refusal] = {}  # by the schema's digest, the last used last
        self._tokenizer = ""
        threading.Thread(target=self._watch, name="engine-watch", daemon=True).start()

    def _watch(self) -> None:
        while not self.engine.errored:
            time.sleep(_LOOKS_EVERY_S)
        self.end()

    def check_alive(self) -> None:
        """Does not return if the engine has died."""
        if self.engine.errored:
            self.end()

    def end(self) -> None:
        """End this replica's process: Ray Serve starts another at once, and the gateway puts the requests that were
        under way to it again. A health check would have to fail three times before that."""
        log.error("vLLM's engine has died; this replica ends")
        os._exit(1)

    async def grammar(self, schema: str, sandbox: Any) -> str:
        """Raises Refusal if no grammar can hold an answer to the schema, or none that is made in time."""
        key = hashlib.sha256(schema.encode()).digest()
        found = self._grammars.pop(key, None)
        if found is None:
            found = await self._make_grammar(schema, sandbox)
        self._grammars[key] = found
        while len(self._grammars) > _GRAMMARS_KEPT:
            del self._grammars[next(iter(self._grammars))]
        if isinstance(found, Refusal):
            raise found
        return found

    async def _make_grammar(self, schema: str, sandbox: Any) -> str | Refusal:
        if not self._tokenizer:
            from xgrammar import TokenizerInfo

            size = self.engine.model_config.get_vocab_size()
            tokenizer: Any = self.engine.renderer.tokenizer
            self._tokenizer = TokenizerInfo.from_huggingface(tokenizer, vocab_size=size).serialize_json()
        try:
            return await sandbox.run(
                "serve.grammars:of_schema", schema, self._tokenizer, deadline_s=DEADLINE_S, processor_s=_GRAMMAR_S
            )
        except ValueError as error:
            said = f"the schema cannot be held to: {error}"
        except (TimeoutError, SandboxError):
            said = (
                f"the schema cannot be held to: its grammar was not made in {_GRAMMAR_S:g} s of a processor; shorten "
                "its patterns, their repetitions and its enums"
            )
        return Refusal(400, said, param="schema")

    async def loaded(self) -> None:
        """Its adapters are: vLLM reads them in an event loop only."""
        if self._loading is None:
            self._loading = asyncio.create_task(self.models.init_static_loras())
        await asyncio.shield(self._loading)  # whoever asks first may leave


class VllmWriter(Writer):
    """A model in an engine of its own, or one of those that share `engine`."""

    def __init__(self, entry: ModelEntry, engine: VllmEngine | None = None):
        super().__init__(entry)
        self.name = entry.name
        self.adapt = own_thread(self._adapted, "reader")
        self.vllm = engine or VllmEngine(entry.path, entry, self.model.max_context)

    async def ready(self) -> bool:
        self.vllm.check_alive()
        await self.vllm.loaded()
        return True

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        return (await self._begin("chat", body)).model_dump(exclude_none=True)

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        return (await self._begin("completion", body)).model_dump(exclude_none=True)

    async def chat_stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        async for event in self._events("chat", body):
            yield event

    async def complete_stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        async for event in self._events("completion", body):
            yield event

    async def _events(self, kind: str, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            async for event in await self._begin(kind, body):
                if event.startswith(_FAILED):
                    self.vllm.check_alive()
                    error = json.loads(event.removeprefix("data: "))["error"]
                    raise self._refusal(error["message"], error["code"], error["param"])
                yield event
        except _errors() as error:
            raise self._as_refusal(error) from None

    async def _begin(self, kind: str, body: dict[str, Any]) -> Any:
        """A response, or a stream of events."""
        from pydantic import ValidationError
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        self.vllm.check_alive()
        await self.vllm.loaded()
        body = await self._for_vllm(body)
        try:
            if kind == "chat":
                body["messages"] = await self.adapt(body["messages"])
                body["chat_template_kwargs"] = chat.template_options(self.model.think)
                found = await self.vllm.chat.create_chat_completion(ChatCompletionRequest.model_validate(body))
            else:
                found = await self.vllm.completion.create_completion(CompletionRequest.model_validate(body))
        except ValidationError as error:
            raise Refusal(400, *_first_of(error)) from None
        except _errors() as error:
            raise self._as_refusal(error) from None
        if isinstance(found, ErrorResponse):
            self.vllm.check_alive()
            raise self._refusal(found.error.message, found.error.code, found.error.param)
        return found

    def _adapted(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The conversation as the model's chat template takes it. Raises Refusal if the template refuses it."""
        told = [{**message, "content": _text_of(message.get("content"))} for message in self.instructed(messages)]
        try:
            return chat.adapted_messages(self.tokenizer, told)
        except InputError as error:
            raise Refusal(400, str(error), param="messages") from None

    async def _for_vllm(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request as vLLM's own server takes it."""
        found: dict[str, Any] = {name: value for name, value in body.items() if value is not None}
        found["model"] = self.name
        schema = response_schema(found.pop("response_format", None))
        if schema is not None:
            grammar = await self.vllm.grammar(json.dumps(schema), self.sandbox)
            found["structured_outputs"] = {"grammar": grammar}
        asked = found.pop("max_completion_tokens", None) or found.get("max_tokens")
        # Without a limit vLLM takes all that the context has left, and it refuses one that is above the context.
        found["max_tokens"] = min(self.model.max_tokens if asked is None else asked, self.model.max_context)
        if found.get("n", 1) > 1 and found.get("temperature") == 0:
            found |= {"temperature": 1.0, "top_k": 1}  # as greedy; vLLM refuses several greedy answers
        return found

    async def write(self, wanted: Wanted) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        self.vllm.check_alive()
        guide = None
        if wanted.schema:
            guide = StructuredOutputsParams(grammar=await self.vllm.grammar(wanted.schema, self.sandbox))
        how = SamplingParams(
            temperature=wanted.temperature, max_tokens=wanted.max_tokens, seed=wanted.seed, structured_outputs=guide
        )
        await self.vllm.loaded()
        adapter = self.vllm.models.lora_requests.get(self.name)
        text = ""
        try:
            prompt: Any = {"prompt_token_ids": list(wanted.tokens)}
            async for output in self.vllm.engine.generate(prompt, how, uuid.uuid4().hex, lora_request=adapter):
                text = output.outputs[0].text
        except _errors() as error:
            raise self._as_refusal(error) from None
        return text

    def _as_refusal(self, error: Exception) -> Refusal:
        """400 if a request is at fault; what fails for another reason is 500, or 503 if another try may help."""
        from vllm.exceptions import GracefulHTTPError, RetryableRequestError, VLLMServerError

        self.vllm.check_alive()
        if isinstance(error, GracefulHTTPError | RetryableRequestError):
            return Refusal(503, f"model '{self.name}' is busy; come back later", retry_after=1)
        cause = error.__cause__ if isinstance(error, VLLMServerError) else error
        if cause is None or not isinstance(cause, _client_errors()):
            return Refusal(500, f"model '{self.name}' failed on this request")
        return self._refusal(str(cause) or type(cause).__name__, 400, getattr(cause, "parameter", None))

    def _refusal(self, said: str, status: int, param: str | None) -> Refusal:
        """vLLM's words, without its options, or paths of this machine."""
        if status >= 500:
            return Refusal(status, f"model '{self.name}' failed on this request")
        if "context length" in said:
            return Refusal(
                400, f"the prompt does not fit into this model's context of {self.model.max_context} tokens",
                "context_length_exceeded", param,
            )  # fmt: skip
        first = next(iter(said.strip().splitlines()), "").partition(" (parameter=")[0][:300]
        if not first or _INTERNAL.search(first):
            first = "the model cannot answer this request as it is"
        return Refusal(status, first, param=param)


class SharedWriters(Holder):
    """Models whose adapters share one base, by name."""

    def __init__(self, entries: Sequence[ModelEntry]):
        first = entries[0]
        adapters = {entry.name: trained.adapter_of(Path(entry.path), Path(first.base)) for entry in entries}
        longest = max(trained.read(Path(entry.path), entry.max_context).max_context for entry in entries)
        self.vllm = VllmEngine(first.base, first, longest, adapters)
        self.writers = {entry.name: VllmWriter(entry, self.vllm) for entry in entries}

    def of_model(self, name: str) -> VllmWriter:
        return self.writers[name]


def _text_of(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def _first_of(error: Any) -> tuple[str, str | None, str | None]:
    """Message, code and param of what vLLM's form of a request does not allow. (The gateway has checked it before.)"""
    first = error.errors()[0]
    place = str(first["loc"][0]) if first["loc"] else ""
    said = first["msg"].removeprefix("Value error, ")
    return (f"{place}: {said}" if place else said), None, place or None


def _errors() -> tuple[type[Exception], ...]:
    """What vLLM raises for one request."""
    from vllm.exceptions import VLLMError

    return VLLMError, *_client_errors()


def _client_errors() -> tuple[type[Exception], ...]:
    """What it raises if a request is at fault: its own errors, and whatever Python's says about a value."""
    from jinja2 import TemplateError
    from vllm.exceptions import VLLMClientError

    return (
        VLLMClientError, ValueError, TypeError, NotImplementedError, ArithmeticError, RecursionError, LookupError,
        TemplateError,
    )  # fmt: skip
