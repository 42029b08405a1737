"""The gateway before tiny models in this process, for unit tests and for the browser."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from serve.errors import Refusal


class InProcess:
    """A replica without Ray: the same object, called directly."""

    def __init__(self, holder: Any, name: str = "only"):
        self.holder, self.name = holder, name

    async def call(self, method: str, *arguments: Any) -> Any:
        found = await self.holder.on(self.name, method, *arguments)
        if isinstance(found, Refusal):
            raise found
        return found

    async def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]:
        async for item in self.holder.stream_on(self.name, method, *arguments):
            if isinstance(item, Refusal):
                raise item
            yield item


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_encoder: Path) -> dict[str, Path]:
    import served_models

    return served_models.write(tmp_path_factory.mktemp("served"), tiny_model, tiny_encoder)


@pytest.fixture(scope="session")
def replicas(folders: dict[str, Path]) -> dict[str, InProcess]:
    from serve.config import ModelEntry
    from serve.replicas import Encoder, PlainWriter

    encoders = ("embeddings", "reranker", "intent_router")
    return {
        name: InProcess((Encoder if name in encoders else PlainWriter)(ModelEntry(path=str(folder), name=name)))
        for name, folder in folders.items()
    }


@pytest.fixture
def settings(folders: dict[str, Path], tmp_path: Path) -> Any:
    from serve.config import GatewaySettings, Served

    encoders = ("embeddings", "reranker", "intent_router")
    models = [
        Served(
            name=name, model_type=name, policy="ranking" if name in encoders else "text", created=1,
            example={"prompt": "1 + 1"} if name == "task_llm" else {},
        )
        for name in folders
    ]  # fmt: skip
    return GatewaySettings(models=models, feedback=str(tmp_path / "feedback.jsonl"), runs=str(tmp_path / "out"))


@pytest.fixture
def ask(settings: Any, replicas: dict[str, InProcess]) -> Iterator[Any]:
    """A client of the gateway in this process."""
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    with TestClient(create_app(settings, replicas.__getitem__), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def address(settings: Any, replicas: dict[str, InProcess]) -> Iterator[str]:
    """Of the gateway behind a real HTTP server."""
    from serve.gateway import create_app

    with listening(create_app(settings, replicas.__getitem__)) as at:
        yield at


@contextmanager
def listening(gateway: Any, limits: Any = None, **access: Any) -> Iterator[str]:
    """The address of a gateway that listens as under `srl-rlvr serve`."""
    from serve.config import Access, Limits, ServeConfig
    from serve.listener import Listener, bound

    with bound("127.0.0.1", 0) as free:
        config = ServeConfig(port=free.getsockname()[1], access=Access(**access), limits=limits or Limits())
        server = Listener(config, gateway)
        thread = threading.Thread(target=server.run, args=([free],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield server.at
        server.should_exit = True
        thread.join(10)
