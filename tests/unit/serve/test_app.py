"""What goes to an encoder's replicas as one, and what comes back to each."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError, RaySystemError
from ray.serve.exceptions import BackPressureError, RayServeException

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


def test_a_request_with_many_texts_holds_up_no_other(replicas: dict[str, Any]) -> None:
    """It goes to the replica by itself, and others are encoded between its pieces."""

    async def run() -> None:
        encoder = replicas["embeddings"].holder
        replica = Blocked(encoder, queue=3)
        long = asyncio.create_task(replica.call("embed", ["one " * 2000] * 100, None))
        await asyncio.sleep(0)
        short = asyncio.create_task(replica.call("embed", ["one"], None))
        await asyncio.sleep(0.05)
        assert [method for method, *_ in replica.asked] == ["embed", "many"]
        replica.go_on.set()
        vectors, _ = await short
        assert not long.done()
        assert (await long)[0].shape == (100, vectors.shape[1])

    asyncio.run(run())


def test_calls_that_wait_go_as_one_and_a_refusal_is_its_callers_alone(replicas: dict[str, Any]) -> None:
    async def run() -> None:
        replica = Blocked(replicas["embeddings"].holder, queue=3)
        asked = []
        for texts, dimensions in ((["one"], None), (["two", "three"], 4), (["four"], 10**6), (["one"], None)):
            asked.append(asyncio.create_task(replica.call("embed", texts, dimensions)))
            await asyncio.sleep(0)
        with pytest.raises(Refusal, match="all it can do") as found:
            await replica.call("embed", ["five"], None)
        assert found.value.status == 503 and found.value.retry_after
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


class Handle:
    """Ray Serve's, of a replica that does or raises what the script says, call after call."""

    def __init__(self, script: list[Any]):
        self.script, self.asked = script, list[tuple[Any, ...]]()
        self.on = self.stream_on = self

    def options(self, stream: bool) -> Handle:
        return self

    def remote(self, *arguments: Any) -> Any:
        self.asked.append(arguments)
        return Response(self.script.pop(0))


class Response:
    def __init__(self, items: list[Any]):
        self.items = items

    def cancel(self) -> None:
        pass

    def __await__(self) -> Any:
        async def found() -> Any:
            [item] = self.items
            if isinstance(item, RayActorError):
                raise item
            return item

        return found().__await__()

    async def __aiter__(self) -> Any:
        for item in self.items:
            if isinstance(item, RayActorError):
                raise item
            yield item


def behind(*script: list[Any]) -> tuple[HandleReplica, Handle]:
    model = Served(name="mine", model_type="task_llm", policy="text", created=1)
    replica, handle = HandleReplica("mine", model), Handle(list(script))
    replica.handle = handle  # type: ignore[misc]
    return replica, handle


DIED = RayActorError()


def test_a_refusal_that_a_replica_returns_is_raised_here() -> None:
    async def run() -> None:
        replica, handle = behind([Refusal(422, "no JSON", "invalid_answer")], ["first", Refusal(400, "too hot")])
        with pytest.raises(Refusal) as found:
            await replica.call("chat", {})
        assert (found.value.status, found.value.code) == (422, "invalid_answer")
        seen = []
        with pytest.raises(Refusal, match="too hot"):
            async for item in replica.stream("chat_stream", {}):
                seen.append(item)
        assert seen == ["first"] and handle.asked == [("mine", "chat", {}), ("mine", "chat_stream", {})]

    asyncio.run(run())


def test_what_died_with_its_replica_is_asked_once_more_unless_a_stream_has_begun() -> None:
    async def run() -> None:
        assert await behind([DIED], ["answer"])[0].call("chat", {}) == "answer"
        assert [item async for item in behind([DIED], ["a", "b"])[0].stream("chat_stream", {})] == ["a", "b"]
        for script in ([DIED], [DIED]), (["a", DIED], ["b"]):
            seen = []
            with pytest.raises(Refusal) as found:
                async for item in behind(*script)[0].stream("chat_stream", {}):
                    seen.append(item)
            assert found.value.status == 503 and found.value.retry_after and "mine" in found.value.message
            assert seen == [item for item in script[0] if item is not DIED]
        with pytest.raises(Refusal) as found:
            await behind([DIED], [DIED])[0].call("chat", {})
        assert found.value.status == 503 and found.value.retry_after

    asyncio.run(run())


def test_whether_a_model_is_ready_is_not_asked_twice() -> None:
    async def run() -> None:
        replica, handle = behind([DIED], [True])
        with pytest.raises(Refusal):
            await replica.call("ready")
        assert len(handle.asked) == 1 and await replica.call("ready") is True

    asyncio.run(run())


class Failing(HandleReplica):
    """Each try ends with the next of these errors; a text is an answer."""

    def __init__(self, *ends: Any):
        super().__init__("a", Served(name="a", model_type="task_llm", policy="text", created=1))
        self.ends = list(ends)

    async def _once(self, method: str, arguments: Any) -> Any:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def rpc_error(code: str, details: str) -> Exception:
    from grpc import StatusCode
    from grpc.aio import AioRpcError, Metadata

    return AioRpcError(StatusCode[code], Metadata(), Metadata(), details)


LARGER = "Received message larger than max (4506607 vs. 4194304)"


@pytest.mark.parametrize(
    ("ends", "status", "tries"),
    [
        ([rpc_error("RESOURCE_EXHAUSTED", LARGER)], 413, 1),
        ([RuntimeError(f"Unexpected error (StatusCode.RESOURCE_EXHAUSTED): {LARGER}.")], 413, 1),
        ([rpc_error("INTERNAL", "a broken connection")] * 2, 503, 2),
        ([RuntimeError("Unexpected error (StatusCode.UNKNOWN): .")] * 2, 503, 2),
        ([RaySystemError("gone")] * 2, 503, 2),
        ([RayServeException("no such application")] * 2, 503, 2),
        ([BackPressureError(1, 1)], 503, 1),
    ],
)
def test_what_fails_on_its_way_is_too_large_or_comes_back_later(ends: Any, status: int, tries: int) -> None:
    replica = Failing(*ends, "an answer")
    with pytest.raises(Refusal) as found:
        asyncio.run(replica.call("chat", {}))
    assert found.value.status == status and (status == 413 or found.value.retry_after)
    assert len(replica.ends) == len(ends) + 1 - tries


def test_a_call_that_failed_on_its_way_is_put_once_more() -> None:
    assert asyncio.run(Failing(rpc_error("INTERNAL", "broken"), "an answer").call("chat", {})) == "an answer"


def test_a_defect_stays_one() -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        asyncio.run(Failing(RuntimeError("a defect"), "an answer").call("chat", {}))


def test_a_large_call_goes_alone(replicas: dict[str, Any]) -> None:
    async def run() -> None:
        replica = Blocked(replicas["embeddings"].holder, queue=100)
        asked = [asyncio.create_task(replica.call("embed", ["first"], None))]
        await asyncio.sleep(0)
        for texts in (["a"], ["b" * 2**19], ["c"], ["d"]):
            asked.append(asyncio.create_task(replica.call("embed", texts, None)))
            await asyncio.sleep(0)
        replica.holder = Counting()
        replica.go_on.set()
        await asyncio.gather(*asked)
        assert [(method, len(calls)) for method, calls, *_ in replica.asked] == [("many", 1), ("embed", 1), ("many", 3)]

    asyncio.run(run())


class Counting:
    async def embed(self, texts: Any, dimensions: Any) -> None:
        pass

    async def many(self, calls: Any) -> Any:
        return [None] * len(calls)


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
