from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve.errors import Refusal
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


def test_a_stream_that_vllm_ends_with_an_error_is_refused() -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    failed: Any = GenerateBaseServing.create_streaming_error_response

    class Dying(VllmWriter):
        def __init__(self) -> None:
            pass

        async def _begin(self, kind: str, body: dict[str, Any]) -> AsyncIterator[str]:
            async def events() -> AsyncIterator[str]:
                yield "data: first\n\n"
                yield f"data: {failed(GenerateBaseServing.__new__(GenerateBaseServing), RuntimeError('dead'))}\n\n"

            return events()

    async def run() -> None:
        events = Dying().chat_stream({})
        assert await anext(events) == "data: first\n\n"
        with pytest.raises(Refusal) as found:
            await anext(events)
        assert found.value.status == 500 and "dead" in found.value.message

    asyncio.run(run())
