"""Whatever fits the OpenAPI, by schemathesis: no 5xx, and every answer in its declared form."""

from __future__ import annotations

from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")

CHECKS = (  # that what fits is accepted is none: a JSON Schema does not say that a text holds no NUL
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


ASKED = {
    "/v1/completions": {"prompt": "1 + 1"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "1 + 1"}]},
}


def described(settings: Any, replicas: dict[str, Any]) -> Any:
    from serve.gateway import create_app

    return schemathesis.openapi.from_asgi("/openapi.json", create_app(settings, replicas.__getitem__))


def checks() -> list[Any]:
    return [schemathesis.checks.CHECKS.get_one(name) for name in CHECKS]


@pytest.mark.parametrize("path", ASKED)
def test_a_stream_keeps_to_what_it_says(settings: Any, replicas: dict[str, Any], path: str) -> None:
    body = ASKED[path] | {"model": "extractor", "stream": True}
    case = described(settings, replicas)[path]["POST"].Case(body=body, media_type="application/json")
    response = case.call_and_validate(checks=checks())
    assert response.headers["content-type"][0].startswith("text/event-stream")


def test_every_endpoint_keeps_to_what_it_says(settings: Any, replicas: dict[str, Any]) -> None:
    asked = []
    operations = described(settings, replicas).get_all_operations()
    for found in operations:  # schemathesis' own pytest plugin does not know pytest 9
        operation = found.ok()

        @hypothesis.settings(
            max_examples=10, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(case=operation.as_strategy())
        def keeps_to_it(case: Any) -> None:
            case.call_and_validate(checks=checks())

        keeps_to_it()
        asked.append(operation.label)
    assert "POST /v1/route" in asked and len(asked) >= 14
