"""Writers of text in vLLM's asynchronous engine: a model in its own, or adapters of one base together in one."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from serve.config import ModelEntry
from serve.errors import Refusal
from serve.replicas import Wanted, Writer, response_schema
from srl_rlvr import trained

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM has room for
_ADAPTERS_AT_HAND = 8  # beside the layers at a time; vLLM changes them as requests come
_FAILED = 'data: {"error":'  # how a stream of vLLM's begins to say so


class VllmEngine:
    """vLLM's engine with its own OpenAI server's handling of requests. `entry` says how it runs."""

    def __init__(self, model: str, entry: ModelEntry, max_context: int, adapters: Mapping[str, Path] | None = None):
        import torch

        from srl_rlvr.engines import vllm_engine

        for name, value in vllm_engine.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
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

    def check_health(self) -> None:
        if self.engine.errored:
            raise RuntimeError("the engine has died")

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
        self.vllm = engine or VllmEngine(entry.path, entry, self.model.max_context)

    async def ready(self) -> bool:
        await self.vllm.loaded()
        return True

    def check_health(self) -> None:
        self.vllm.check_health()

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
                    error = json.loads(event.removeprefix("data: "))["error"]
                    raise Refusal(error["code"], error["message"], param=error["param"])
                yield event
        except _client_errors() as error:
            raise _as_refusal(error) from None

    async def _begin(self, kind: str, body: dict[str, Any]) -> Any:
        """A response, or a stream of events."""
        from pydantic import ValidationError
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        await self.vllm.loaded()
        schema = response_schema(body.get("response_format"))
        if schema is not None:
            grammar = _grammar(json.dumps(schema))
            body = body | {"response_format": None, "structured_outputs": {"grammar": grammar}}
        body = body | {"model": self.name}
        if not body.get("max_completion_tokens"):  # else vLLM takes all that the context has left
            body["max_tokens"] = body.get("max_tokens") or self.model.max_tokens
        try:
            if kind == "chat":
                body = body | {"messages": self.instructed(body["messages"])}
                found = await self.vllm.chat.create_chat_completion(ChatCompletionRequest.model_validate(body))
            else:
                found = await self.vllm.completion.create_completion(CompletionRequest.model_validate(body))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise Refusal(400, f"{place}: {first['msg']}" if place else first["msg"]) from None
        except _client_errors() as error:
            raise _as_refusal(error) from None
        if isinstance(found, ErrorResponse):
            raise Refusal(found.error.code, found.error.message, param=found.error.param)
        return found

    async def write(self, wanted: Wanted) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        guide = StructuredOutputsParams(grammar=_grammar(wanted.schema)) if wanted.schema else None
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
        except _client_errors() as error:
            raise _as_refusal(error) from None
        return text


class SharedWriters:
    """Models whose adapters share one base, by name."""

    def __init__(self, entries: Sequence[ModelEntry]):
        first = entries[0]
        adapters = {entry.name: trained.adapter_of(Path(entry.path), Path(first.base)) for entry in entries}
        longest = max(trained.read(Path(entry.path), entry.max_context).max_context for entry in entries)
        self.vllm = VllmEngine(first.base, first, longest, adapters)
        self.writers = {entry.name: VllmWriter(entry, self.vllm) for entry in entries}

    def check_health(self) -> None:
        self.vllm.check_health()

    async def on(self, model: str, method: str, *arguments: Any) -> Any:
        return await getattr(self.writers[model], method)(*arguments)

    async def stream_on(self, model: str, method: str, *arguments: Any) -> AsyncIterator[Any]:
        async for event in getattr(self.writers[model], method)(*arguments):
            yield event


@functools.lru_cache(maxsize=256)
def _grammar(schema: str) -> str:
    """For answers as the types write them: line breaks, no endless white space, and fields in the order of the text
    where none is required. (In any order the grammar cannot see to it that each of some comes once.)

    Raises Refusal where the schema asks for what no grammar can hold to.
    """
    from xgrammar import Grammar

    try:
        any_order = '"required"' not in schema
        return str(Grammar.from_json_schema(schema, any_order=any_order, max_whitespace_cnt=2))
    except RuntimeError as error:
        said = str(error).splitlines()[0].rpartition(": ")[2][:200]
        raise Refusal(400, f"the schema cannot be held to: {said}", param="schema") from None


def _client_errors() -> tuple[type[Exception], ...]:
    """What vLLM raises where a request is at fault."""
    from vllm.exceptions import VLLMClientError

    return VLLMClientError, ValueError, TypeError, NotImplementedError


def _as_refusal(error: Exception) -> Refusal:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    said = said.partition(" (parameter=")[0][:300]
    return Refusal(400, said, "context_length_exceeded" if "context length" in said else None)
