from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.errors import Refusal
from serve.sandbox import Sandbox
from serve.vllm_writers import VllmEngine, VllmWriter


def test_a_client_that_leaves_while_adapters_load_does_not_stop_the_loading() -> None:
    class Models:
        loaded = 0

        async def init_static_loras(self) -> None:
            await asyncio.sleep(0.05)
            self.loaded += 1

    async def run() -> None:
        engine = VllmEngine.__new__(VllmEngine)  # vLLM itself takes half a minute
        models = Models()
        engine.models, engine._loading = models, None  # type: ignore[assignment]
        first = asyncio.create_task(engine.loaded())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await engine.loaded()
        await engine.loaded()
        assert models.loaded == 1

    asyncio.run(run())


class Engine:
    """What a writer asks of VllmEngine; vLLM itself takes half a minute."""

    def __init__(self, dead: bool = False) -> None:
        self.dead, self.ended, self.asked = dead, 0, list[Any]()

    def check_alive(self) -> None:
        if self.dead:
            self.ended += 1
            raise SystemExit  # the process ends

    async def loaded(self) -> None:
        pass

    async def grammar(self, schema: str, sandbox: Any) -> str:
        return f"grammar of {schema}"


class Model:
    max_context, max_tokens, think, folder = 64, 8, False, Path("/models/secret-place")
    model_type = Any


def writer(**engine: Any) -> Any:
    made = VllmWriter.__new__(VllmWriter)
    made.name, made.vllm, made.model, made.sandbox = "mine", Engine(**engine), Model(), None  # type: ignore[assignment]
    return made


def vllms_event(error: Exception) -> str:
    pytest.importorskip("vllm")
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    failed: Any = GenerateBaseServing.create_streaming_error_response
    return f"data: {failed(GenerateBaseServing.__new__(GenerateBaseServing), error)}\n\n"


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("a secret text; see stack trace (above)"), 500), (ValueError("too hot"), 400)]
)
def test_a_stream_that_vllm_ends_with_an_error_is_refused(error: Exception, status: int) -> None:
    event = vllms_event(error)
    failing = writer()

    async def begin(kind: str, body: dict[str, Any]) -> AsyncIterator[str]:
        async def events() -> AsyncIterator[str]:
            yield "data: first\n\n"
            yield event

        return events()

    failing._begin = begin

    async def run() -> None:
        first, last = [item async for item in failing.stream_on("mine", "chat_stream", {})]
        assert first == "data: first\n\n"
        assert isinstance(last, Refusal) and last.status == status  # returned: Ray logs what is raised
        assert ("mine" if status == 500 else "too hot") in last.message and "secret" not in last.message

    asyncio.run(run())


def test_a_replica_whose_engine_has_died_ends_whatever_it_is_asked() -> None:
    event = vllms_event(RuntimeError("dead"))

    async def run() -> None:
        for method in ("ready", "chat", "complete"):
            dead = writer(dead=True)
            with pytest.raises(SystemExit):
                await getattr(dead, method)(*([] if method == "ready" else [{"messages": [], "prompt": "a"}]))
            assert dead.vllm.ended == 1
        dying = writer()

        async def begin(kind: str, body: dict[str, Any]) -> AsyncIterator[str]:
            async def events() -> AsyncIterator[str]:
                dying.vllm.dead = True
                yield event

            return events()

        dying._begin = begin
        with pytest.raises(SystemExit):
            await anext(dying.chat_stream({}))

    asyncio.run(run())


def test_the_watch_ends_the_process_soon_after_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr("serve.vllm_writers.os._exit", lambda code: ended.set())
    engine = VllmEngine.__new__(VllmEngine)
    engine.engine = SimpleNamespace(errored=False)  # type: ignore[assignment]
    watch = threading.Thread(target=engine._watch, daemon=True)
    watch.start()
    assert not ended.wait(0.3)
    engine.engine.errored = True  # type: ignore[misc]
    assert ended.wait(1)
    watch.join(1)


def test_a_request_is_put_to_vllm_within_the_models_bounds() -> None:
    mine = writer()
    mine.instructed = lambda messages: messages

    def put(**body: Any) -> dict[str, Any]:
        return asyncio.run(mine._for_vllm({"prompt": "a"} | body))

    assert put()["max_tokens"] == 8 and put(max_tokens=0, echo=True)["max_tokens"] == 0
    assert put(max_tokens=4096)["max_tokens"] == put(max_completion_tokens=4096)["max_tokens"] == 64
    assert put(max_tokens=5, max_completion_tokens=None)["max_tokens"] == 5
    assert put(n=2, temperature=0) | {"top_k": 1, "temperature": 1.0} == put(n=2, temperature=0)
    assert "top_k" not in put(n=1, temperature=0) and put(model="other")["model"] == "mine"
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    found = put(response_format=form)
    assert found["structured_outputs"] == {"grammar": 'grammar of {"type": "object"}'}
    assert "response_format" not in found and "structured_outputs" not in put(response_format={"type": "text"})


def test_vllms_errors_are_one_sentence_without_its_options_or_paths() -> None:
    pytest.importorskip("vllm")
    from jinja2 import TemplateError
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineGenerateError

    def of(error: Exception, cause: Exception | None = None) -> Refusal:
        error.__cause__ = cause
        return writer()._as_refusal(error)

    for error in (
        VLLMValidationError("too many", parameter="n", value=1), ValueError("too many"), OverflowError("too many"),
        TypeError("too many"), RecursionError("too many"), KeyError("too many"), TemplateError("too many"),
    ):  # fmt: skip
        assert of(error).status == of(EngineGenerateError(), error).status == 400
        assert "too many" in of(error).message and "value=" not in of(error).message
    long = of(ValueError("This model's maximum context length is 64 tokens. However, you requested --max-model-len"))
    assert long.code == "context_length_exceeded" and "64" in long.message and "--" not in long.message
    for said in ("set --enable-auto-tool-choice", "/models/secret-place is not a multimodal model", ""):
        hidden = of(ValueError(said))
        assert hidden.status == 400 and hidden.message and "--" not in hidden.message and "/" not in hidden.message
    assert of(EngineGenerateError(), RuntimeError("a text")).status == 500
    assert "a text" not in of(EngineGenerateError(), RuntimeError("a text")).message


def test_vllm_leaves_the_handlers_of_logging_as_they_are() -> None:
    pytest.importorskip("vllm")
    code = (
        "import logging.handlers, os\n"
        "from serve.vllm_writers import _LOGGING\n"
        "handler = logging.handlers.MemoryHandler(1, target=logging.StreamHandler())\n"  # Ray Serve has such a one
        "logging.getLogger('ray.serve').addHandler(handler)\n"
        "os.environ.update(_LOGGING)\n"
        "import vllm.logger\n"
        "assert handler.target is not None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"VLLM_CONFIGURE_LOGGING": "1"})


# Grammars


def schema_of(**keywords: Any) -> str:
    return json.dumps({"type": "object", "properties": {"a": keywords}, "required": ["a"]})


@pytest.fixture(scope="module")
def grammars(tiny_model: Path) -> Iterator[Any]:
    """`VllmEngine.grammar` of a model."""
    pytest.importorskip("xgrammar")
    from srl_rlvr.policies import base_models

    engine = VllmEngine.__new__(VllmEngine)
    tokenizer = base_models.load_tokenizer(tiny_model)
    config = SimpleNamespace(get_vocab_size=lambda: len(tokenizer))
    engine.engine = SimpleNamespace(  # type: ignore[assignment]
        model_config=config, renderer=SimpleNamespace(tokenizer=tokenizer)
    )
    engine._grammars, engine._tokenizer = {}, ""
    sandbox = Sandbox(workers=1, memory_mib=2048)
    yield lambda schema: asyncio.run(engine.grammar(schema, sandbox))
    sandbox.close()


def test_a_schema_becomes_a_grammar(grammars: Any) -> None:
    found = grammars(schema_of(enum=["Rome"]))
    assert "root ::=" in found and "Rome" in found and grammars(schema_of(enum=["Rome"])) is found


@pytest.mark.parametrize(
    "keywords",
    [
        {"type": "string", "pattern": "^(" + "[a-z]{1,300}" * 2000 + ")$"},  # minutes
        {"type": "string", "pattern": "(" * 200_000 + "a" + ")" * 200_000},
        {"type": "integer", "minimum": 10**4000},
        {"type": "string", "minLength": 10**30},
        {"enum": ["a" * 300_000]},
    ],
)
def test_a_schema_that_takes_too_long_or_is_too_large_is_refused_at_once_the_second_time(
    grammars: Any, keywords: dict[str, Any]
) -> None:
    for limit_s in (60, 0.5):
        began = time.monotonic()
        with pytest.raises(Refusal) as found:
            grammars(schema_of(**keywords))
        assert found.value.status == 400 and found.value.param == "schema" and "\n" not in found.value.message
        assert time.monotonic() - began < limit_s
    assert grammars(schema_of(type="string"))
