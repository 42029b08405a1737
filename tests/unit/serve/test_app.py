"""What goes to an encoder's replicas as one, and what comes back to each."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from ray.serve.exceptions import RayServeException

from serve import app
from serve.app import HandleReplica
from serve.config import ModelEntry, ServeConfig, Served
from serve.errors import Refusal
from srl_rlvr.errors import InputError


class Blocked(HandleReplica):
    """Behind it is a replica in this process, which waits until it is told to go on."""

    def __init__(self, holder: Any, queue: int):
        super().__init__("embeddings", Served(
            name="embeddings", model_type="embeddings", policy="ranking", created=1, batches=1, queue=queue
        ))  # fmt: skip
        self.holder, self.go_on, self.asked = holder, asyncio.Event(), list[tuple[Any, ...]]()

    async def _call(self, method: str, *arguments: Any) -> Any:
        self.asked.append((method, *arguments))
        await self.go_on.wait()
        return await getattr(self.holder, method)(*arguments)


def test_calls_that_wait_go_as_one_and_a_refusal_is_its_callers_alone(replicas: dict[str, Any]) -> None:
    async def run() -> None:
        replica = Blocked(replicas["embeddings"].holder, queue=3)
        asked = []
        for texts, dimensions in ((["one"], None), (["two", "three"], 4), (["four"], 10**6), (["one"], None)):
            asked.append(asyncio.create_task(replica.call("embed", texts, dimensions)))
            await asyncio.sleep(0)
        with pytest.raises(Refusal, match="all it can do") as found:
            await replica.call("embed", ["five"], None)
        assert found.value.status == 429
        replica.go_on.set()
        first, second, fourth = [await asked[number] for number in (0, 1, 3)]
        with pytest.raises(Refusal, match="this model has"):
            await asked[2]
        assert [(method, len(calls)) for method, calls in replica.asked] == [("many", 1), ("many", 3)]
        assert second[0].shape == (2, 4)
        np.testing.assert_allclose(first[0], fourth[0], rtol=1e-4, atol=1e-6)
        assert first[1] == fourth[1] > 0
        assert await replica.call("ready") is True and replica.asked[-1] == ("ready",)

    asyncio.run(run())


def test_an_application_that_is_not_deployed_yet_is_an_absent_replica(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    def absent(name: str) -> Any:
        raise RayServeException(f"Application '{name}' does not exist.")

    monkeypatch.setattr("serve.app.ray_serve.get_app_handle", absent)
    models = {model.name: HandleReplica(model.name, model) for model in settings.models}
    chat = {"model": "task_llm", "messages": [{"role": "user", "content": "hi"}]}
    with TestClient(create_app(settings, models.__getitem__)) as client:
        answers = [client.post("/v1/chat/completions", json=chat | {"stream": stream}) for stream in (False, True)]
        for answer in (*answers, client.get("/readyz")):
            assert answer.status_code == 503 and answer.headers["retry-after"]


def test_models_of_any_name_are_applications_in_ascii(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["Übersetzer / 1", "名前#1", "plain-1.2"]
    path = str(folders["intent_router"])
    config = ServeConfig(models=[ModelEntry(path=path, name=name) for name in names])
    written = [each["name"] for each in app.applications(config)["applications"]]
    assert written == ["%C3%9Cbersetzer%20%2F%201", "%E5%90%8D%E5%89%8D%231", "plain-1.2", "gateway"]
    asked: list[str] = []
    monkeypatch.setattr("serve.gateway.create_app", lambda settings, pick, **_: pick)
    monkeypatch.setattr("serve.app.ray_serve.get_app_handle", asked.append)
    pick = app.gateway_of(app.settings_of(config))
    for name in names:
        replica = pick(name)
        assert replica.model == name and replica.handle is None
    assert asked == written[:3]


@pytest.mark.parametrize(("first", "second"), [("a", "a"), ("gateway", "b"), ("a/b", "a/b")])
def test_two_models_of_one_name_are_refused(folders: Any, first: str, second: str) -> None:
    entries = [ModelEntry(path=str(folders["intent_router"]), name=name) for name in (first, second)]
    with pytest.raises(InputError, match="'name'"):
        app.settings_of(ServeConfig(models=entries))
