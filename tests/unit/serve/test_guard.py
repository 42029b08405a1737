"""What holds for every request, whatever its endpoint."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from serve.access import new_key
from serve.gateway import create_app

JSON = {"content-type": "application/json"}


class Echo:
    """A replica that answers everything at once."""

    name = "echo"

    async def call(self, method: str, *arguments: Any) -> Any:
        if method == "route":
            return [("a", 1.0, [])] * len(arguments[0])
        return {"answer": [], "text": "", "choices": [], "id": "a", "object": "a", "created": 1, "model": "a"}


@pytest.fixture
def everywhere(settings: Any) -> Any:
    return dict.fromkeys((model.name for model in settings.models), Echo())


def client(settings: Any, models: Any, **named: Any) -> TestClient:
    return TestClient(create_app(settings, models.__getitem__), raise_server_exceptions=False, **named)


def asgi(app: Any, method: str, path: str, receive: Any, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    """What the application sends, by a connection of the test's own."""
    sent: dict[str, Any] = {"body": b""}

    async def send(message: dict[str, Any]) -> None:
        sent["status"] = message.get("status", sent.get("status"))
        sent["body"] += message.get("body", b"")

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *headers], "http_version": "1.1", "scheme": "http",
        "root_path": "", "server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2),
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 10))
    return sent


async def endless() -> dict[str, Any]:
    await asyncio.sleep(60)
    raise AssertionError


# Bodies


@pytest.mark.parametrize("path", ["/healthz", "/docs", "/console", "/v1/models", "/v1/nothing", "/nothing", "/"])
def test_a_path_that_takes_no_body_reads_none(settings: Any, path: str) -> None:
    asked = 0

    async def receive() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if asked > 1:  # the first may only be the watch for a client that leaves
            await asyncio.sleep(60)
        return {"type": "http.request", "body": b"a", "more_body": True}

    assert asgi(create_app(settings, {}.__getitem__), "POST", path, receive)["status"] in (404, 405)


def test_a_client_that_leaves_before_its_body_is_whole_gets_no_work(settings: Any, everywhere: Any) -> None:
    messages = [{"type": "http.request", "body": b'{"input": "a"}', "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    assert "status" not in asgi(create_app(settings, everywhere.__getitem__), "POST", "/v1/route", receive)
    assert not messages


def test_a_body_that_does_not_come_in_time_is_408(settings: Any) -> None:
    settings.limits.receive_s = 0.05
    found = asgi(create_app(settings, {}.__getitem__), "POST", "/v1/route", endless)
    assert found["status"] == 408 and b"0.05 s" in found["body"]


def test_many_large_bodies_at_once_are_503_and_a_small_one_is_not(settings: Any, everywhere: Any) -> None:
    from serve import guard

    settings.limits.body_mib = 2
    made = create_app(settings, everywhere.__getitem__)
    with TestClient(made) as asked:
        found: Any = made.middleware_stack
        while not isinstance(found, guard.Guard):
            found = found.app
        found.held = 17 * 2 * 2**20
        held = found.held
        large = json.dumps({"input": "a" * (2**20 + 100)})
        refused = asked.post("/v1/route", content=large, headers=JSON)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert asked.post("/v1/route", json={"input": "a"}).status_code == 200
        assert found.held == held
        found.held = 0
        assert asked.post("/v1/route", content=large, headers=JSON).status_code == 200
        assert found.held == 0


@pytest.mark.parametrize("filler", ["0,", "[],", "{},", '{"a":1},'])
def test_a_body_of_very_many_values_is_refused_at_once(settings: Any, everywhere: Any, filler: str) -> None:
    body = f'{{"input": "a", "x": [{filler * 1_000_000}0]}}'
    with client(settings, everywhere) as asked:
        began = time.process_time()
        response = asked.post("/v1/route", content=body, headers=JSON)
        assert response.status_code == 400 and "200,000 are the most" in response.json()["error"]["message"]
        assert time.process_time() - began < 1


def test_commas_and_brackets_in_texts_are_no_values(settings: Any, everywhere: Any) -> None:
    text = 'a, [b] {c} \\"d\\" ' * 100_000
    with client(settings, everywhere) as asked:
        for body in ({"input": text}, {"input": [text[:900]] * 2000}):
            assert asked.post("/v1/route", json=body).status_code == 200


@pytest.mark.parametrize("levels", [200, 700, 100_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_a_deep_body_is_400(settings: Any, everywhere: Any, levels: int, brackets: str) -> None:
    opening = "[" if brackets == "[]" else '{"a":'
    deep = opening * levels + "1" + brackets[1] * levels
    with client(settings, everywhere) as asked:
        body = f'{{"model": "task_llm", "messages": [{{"role": "user", "content": "a"}}], "x": {deep}}}'
        response = asked.post("/v1/chat/completions", content=body, headers=JSON)
        assert response.status_code == 400 and "nested too deeply" in response.json()["error"]["message"]


def test_a_long_conversation_is_not_deep(settings: Any, everywhere: Any) -> None:
    body = {"model": "task_llm", "messages": [{"role": "user", "content": "a]}"}] * 500}
    with client(settings, everywhere) as asked:
        assert asked.post("/v1/chat/completions", json=body).status_code == 200


def test_a_large_text_of_any_script_does_not_stop_others(settings: Any, everywhere: Any) -> None:
    settings.limits.body_mib = 20
    body = json.dumps({"input": "é" * 9_000_000}, ensure_ascii=False).encode()
    with client(settings, everywhere) as asked:
        began = time.process_time()
        assert asked.post("/v1/route", content=body, headers=JSON).status_code == 200
        assert time.process_time() - began < 1


# Answers of one request


def test_prompts_times_n_are_bounded(settings: Any, everywhere: Any) -> None:
    settings.limits.answers = 8
    chat = {"model": "task_llm", "messages": [{"role": "user", "content": "a"}]}
    with client(settings, everywhere) as asked:
        for path, body, status in (
            ("completions", {"model": "task_llm", "prompt": ["a"] * 4, "n": 2}, 200),
            ("completions", {"model": "task_llm", "prompt": ["a"] * 3, "n": 3}, 400),
            ("completions", {"model": "task_llm", "prompt": ["a"] * 9}, 400),
            ("chat/completions", chat | {"n": 8}, 200),
            ("chat/completions", chat | {"n": 9}, 400),
            ("chat/completions", chat | {"n": 9, "stream": True}, 400),
        ):
            response = asked.post(f"/v1/{path}", json=body)
            assert response.status_code == status
            assert status == 200 or "8 answers are the most" in response.json()["error"]["message"]


def test_a_request_counts_as_its_answers(settings: Any, everywhere: Any) -> None:
    settings.limits.requests_per_minute = 10
    chat = {"model": "task_llm", "messages": [{"role": "user", "content": "a"}]}
    for path, body in (
        ("completions", {"model": "task_llm", "prompt": ["a"] * 5, "n": 2}),
        ("chat/completions", chat | {"n": 12}),
        ("parse", {"input": ["a"] * 10}),
    ):
        with client(settings, everywhere) as asked:
            assert asked.post(f"/v1/{path}", json=body).status_code == 200
            assert asked.post("/v1/route", json={"input": "a"}).status_code == 429
    with client(settings, everywhere) as asked:
        for _ in range(9):
            assert asked.post("/v1/route", json={"input": ["a"] * 50}).status_code == 200


# Whom it names, who names it


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:8000", 200), ("LOCALHOST.:1", 200), ("127.0.0.1:8000", 200), ("127.1.2.3", 200),
        ("[::1]:8000", 200), ("[::1]", 200), ("mine.example:8000", 200),
        ("evil.example", 400), ("evil.example:8000", 400), ("localhost.evil.example", 400),
        ("127.0.0.1.evil.example", 400),
        ("127.0.0.1:8000@evil.example", 400), ("evil.example:80:localhost", 400), ("[", 400), ("", 400),
        ("8.8.8.8", 400), ("[2001:db8::1]", 400), ("0.0.0.0", 400),
    ],
)  # fmt: skip
def test_on_loopback_only_names_of_this_machine_are_answered(settings: Any, host: str, status: int) -> None:
    settings.hosts = ["localhost", "mine.example"]
    with client(settings, {}) as asked:
        assert asked.get("/healthz", headers={"host": host}).status_code == status
        settings.hosts = []
    with client(settings, {}) as asked:
        assert asked.get("/healthz", headers={"host": host}).status_code == 200


def test_the_hosts_of_a_config_are_those_of_loopback_only() -> None:
    from serve.config import Access, ServeConfig, hosts_of

    named = Access(hosts=["mine.example"])
    assert hosts_of(ServeConfig(access=named)) == ["localhost", "mine.example"]
    assert hosts_of(ServeConfig(host="0.0.0.0", access=Access(open=True))) == []


def test_a_trailing_slash_is_not_redirected(settings: Any, everywhere: Any) -> None:
    with client(settings, everywhere, follow_redirects=False) as asked:
        for path in ("/v1/models/", "/v1/route/", "/docs/", "/console/", "/healthz/"):
            for method in ("GET", "POST"):
                response = asked.request(method, path, json={} if method == "POST" else None)
                assert response.status_code in (404, 405) and "location" not in response.headers


def test_a_key_with_scopes_opens_no_path_that_is_not_known(settings: Any, everywhere: Any, tmp_path: Path) -> None:
    token = new_key(tmp_path / "keys.json", "phone", ["route"])
    settings.access.keys = str(tmp_path / "keys.json")
    with client(settings, everywhere, headers={"authorization": f"Bearer {token}"}) as asked:
        for path in ("/nothing", "/models/v1/embeddings", "//v1/models", "/v1/modelsmore", "/v3/route", "/", "/v1"):
            assert asked.get(path).status_code == 403
        assert asked.get("/v1/models").status_code == asked.get("/v1/models/embeddings").status_code == 200
        assert asked.post("/v1/route", json={"input": "a"}).status_code == 200


def test_the_gateways_own_id_stands_beside_the_clients(settings: Any, everywhere: Any) -> None:
    with client(settings, everywhere) as asked:
        first, second = (
            asked.post("/v1/route", json={"input": "a"}, headers={"x-request-id": "mine-1"}) for _ in range(2)
        )
        for response in (first, second):
            assert response.headers["x-client-request-id"] == "mine-1"
            assert response.headers["x-request-id"].startswith("req-")
        assert first.headers["x-request-id"] != second.headers["x-request-id"]
        assert asked.post("/v1/feedback", json={"request_id": "mine-1", "reward": 1}).status_code == 404
        id = first.headers["x-request-id"]
        assert asked.post("/v1/feedback", json={"request_id": id, "reward": 1}).status_code == 200
        for bad in ("a b", "a" * 201, "é", "<script>"):
            response = asked.get("/healthz", headers=[(b"x-request-id", bad.encode("latin-1"))])
            assert "x-client-request-id" not in response.headers


def test_behind_a_proxy_with_an_id_the_gateways_has_another_name(settings: Any, everywhere: Any) -> None:
    with TestClient(create_app(settings, everywhere.__getitem__, says_id=False)) as asked:
        response = asked.post("/v1/route", json={"input": "a"}, headers={"x-request-id": "the-proxys"})
        assert "x-request-id" not in response.headers
        id = response.headers["x-gateway-request-id"]
        assert asked.post("/v1/feedback", json={"request_id": id, "reward": 1}).status_code == 200


def test_no_answer_can_be_framed_or_taken_for_another_type(settings: Any, everywhere: Any) -> None:
    with client(settings, everywhere) as asked:
        answers = [asked.get(path) for path in ("/healthz", "/console", "/docs", "/nothing", "/openapi.json")]
        answers += [asked.post("/v1/route", json={"input": "a"}), asked.post("/v1/route", content=b"a")]
        for answer in answers:
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_what_a_client_names_is_not_sent_back_whole(settings: Any, everywhere: Any) -> None:
    long = "x" * 1_000_000
    with client(settings, everywhere) as asked:
        answers = [
            asked.post("/v1/route", json={"input": "a", "model": long}),
            asked.post("/v1/chat/completions", json={"model": long, "messages": [{"role": "user", "content": "a"}]}),
            asked.get(f"/v1/models/{long[:60_000]}"),
            asked.get(f"/{long[:60_000]}"),
            asked.post("/v1/route", content=b"{}", headers={"content-type": long[:60_000]}),
        ]
    for answer in answers:
        assert answer.status_code in (404, 415) and len(answer.content) < 500
