"""The console's and the reference's pages, and what they read from the gateway."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve import access, pages
from serve.config import Access, Served
from srl_rlvr.examples import shown

SUM = {"prompt": "1 + 1 ="}
REPORT = "<!doctype html><title>a report</title>"


@pytest.fixture
def runs(settings: Any) -> Path:
    folder = Path(settings.runs)
    (folder / "first").mkdir(parents=True)
    (folder / "first" / "result.json").write_text("{}")
    (folder / "first" / "report.html").write_text(REPORT)
    (folder / "secret.txt").write_text("secret")
    return folder


@pytest.fixture
def keyed(settings: Any, replicas: Any, tmp_path: Path) -> Iterator[tuple[Any, str, str]]:
    """A client of a gateway with keys, one that opens all and one for chat."""
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    file = tmp_path / "keys.json"
    all_, chat = access.new_key(file, "all"), access.new_key(file, "chat", ["chat"])
    guarded = settings.model_copy(update={"access": Access(keys=str(file))})
    with TestClient(create_app(guarded, replicas.__getitem__), raise_server_exceptions=False) as client:
        yield client, all_, chat


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/console", "/docs"])
def test_a_page_is_one_file_that_needs_nothing_from_elsewhere(ask: Any, keyed: Any, path: str) -> None:
    response = ask.get(path)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", response.text)
    assert not [found for found in addresses if "//" in found]
    assert not re.search(r"@import|\burl\(|https?://(?!www\.w3\.org/2000/svg)", response.text)
    assert keyed[0].get(path).status_code == 200


def test_no_page_asks_a_content_network(ask: Any) -> None:
    assert ask.get("/redoc").status_code == 404
    assert "cdn" not in ask.get("/docs").text.lower()


def test_the_openapi_takes_a_key(ask: Any, keyed: Any) -> None:
    described = ask.get("/openapi.json").json()
    [(name, scheme)] = described["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert {name: []} in described["security"] and {} in described["security"]
    guarded = keyed[0].get("/openapi.json").json()
    assert guarded["security"] == [{name: []}] and guarded["paths"]["/healthz"]["get"]["security"] == []


def test_the_console_is_told_each_model_with_its_form_and_an_example(settings: Any, ask: Any) -> None:
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    settings.models[:] = [
        Served(name="t", model_type="translator", policy="text", created=1, kind="task_llm", example=SUM, max_tokens=9),
        Served(name="r", model_type="my_ranker", policy="ranking", created=1, kind="reranker"),
        Served(name="e", model_type="my_encoder", policy="ranking", created=1),
        Served(name="x", model_type="extractor", policy="text", created=1),
    ]
    with TestClient(create_app(settings, {}.__getitem__)) as client:
        found = client.get("/console/models").json()
        [info, *_] = client.get("/v1/models").json()["data"]
    assert found["keys"] is False
    kinds = [(model["id"], model["kind"], model["example"]) for model in found["models"]]
    assert kinds == [("t", "task_llm", SUM), ("r", "reranker", {}), ("e", "", {}), ("x", "extractor", {})]
    assert found["models"][0]["max_tokens"] == 9 and info["kind"] == "task_llm"


def test_a_type_like_a_known_one_is_asked_at_its_endpoint(settings: Any, replicas: Any) -> None:
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    mine = Served(name="mine", model_type="my_router", policy="ranking", created=1, kind="intent_router")
    settings.models[:] = [mine]
    with TestClient(create_app(settings, lambda name: replicas["intent_router"])) as client:
        assert client.post("/v1/route", json={"input": "where is my card"}).json()["model"] == "mine"
        refused = client.post("/v1/rerank", json={"model": "mine", "query": "a", "documents": ["a"]})
        assert refused.status_code == 400 and "/v1/route" in refused.json()["error"]["message"]


def test_models_need_any_key_and_load_and_runs_one_for_the_console(keyed: Any, runs: Path) -> None:
    client, all_, chat = keyed
    for path in ("models", "live", "runs", "runs/first/report.html"):
        assert client.get(f"/console/{path}").status_code == 401
        assert client.get(f"/console/{path}", headers=bearer(all_)).status_code == 200
        assert client.get(f"/console/{path}", headers=bearer(chat)).status_code == (200 if path == "models" else 403)
    assert client.get("/console/models", headers=bearer(all_)).json()["keys"] is True


def test_a_report_is_served_apart_from_the_gateways_own_pages(ask: Any, runs: Path) -> None:
    response = ask.get("/console/runs/first/report.html")
    assert response.text == REPORT and response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "sandbox allow-scripts" in policy and "allow-same-origin" not in policy and "connect-src" not in policy


@pytest.mark.parametrize(
    "path",
    ["second/report.html", "first/result.json", "../secret.txt", "first/../../report.html", "%2e%2e/report.html",
     "..%2fout%2ffirst/report.html", "first%2f/report.html", "first%00/report.html", "*/report.html",
     "first/report.html/", ".%2e/report.html", "%2fetc%2fpasswd/report.html", "first/model/model_card.json"],
)  # fmt: skip
def test_nothing_but_a_runs_report_is_served(ask: Any, runs: Path, path: str) -> None:
    response = ask.get(f"/console/runs/{path}", follow_redirects=False)
    assert response.status_code in (307, 404) and response.text not in (REPORT, "secret", "{}")


def test_a_cards_example_is_taken_as_far_as_it_has_the_right_form() -> None:
    whole = {"prompt": "a", "candidates": ["b", "c"], "schema": {"type": "object"}, "image": "aGk="}
    assert shown.readable(whole) == whole
    for given in (None, [], "a", {}, {"prompt": 3}, {"prompt": " "}, {"prompt": "a" * 5000}, {"candidates": ["a"]}):
        assert shown.readable(given) == {}
    wrong = {"prompt": "a", "candidates": [1], "schema": "x", "image": 3, "other": "y"}
    assert shown.readable(wrong) == {"prompt": "a"}
    assert json.loads(json.dumps(pages._listed(Served(name="a", model_type="b", policy="text", created=1))))
