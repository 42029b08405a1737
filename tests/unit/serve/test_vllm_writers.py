from __future__ import annotations

import asyncio

import pytest

from serve.vllm_writers import VllmEngine


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
