"""The gateway before real (tiny) models, without Ray."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve.config import ModelEntry
from serve.errors import Refusal
from serve.replicas import Encoder
from srl_rlvr.policies.ranking import ORDER

NOWHERE = {"$ref": "http://127.0.0.1/schema.json"}
JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "hi"}]


def picture(size: tuple[int, int] = (16, 16), mode: str = "RGB", kind: str = "PNG") -> str:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind)
    return base64.b64encode(out.getvalue()).decode()


def message(response: Any) -> str:
    return response.json()["error"]["message"]


# Answers


def test_models_are_listed_and_ready(ask: Any, folders: dict[str, Path]) -> None:
    assert [model["id"] for model in ask.get("/v1/models").json()["data"]] == list(folders)
    assert ask.get("/v1/models/reranker").json()["model_type"] == "reranker"
    assert ask.get("/healthz").json() == {"status": "ok"} and ask.get("/readyz").json() == {"status": "ready"}


def test_embeddings_are_of_length_one_and_the_same_in_base64_and_cut_to_dimensions(ask: Any) -> None:
    body = {"model": "embeddings", "input": ["hi", "there"]}
    plain = np.array([row["embedding"] for row in ask.post("/v1/embeddings", json=body).json()["data"]])
    coded = ask.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()["data"]
    decoded = np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in coded])
    np.testing.assert_allclose(plain, decoded, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, rtol=1e-5)
    cut = ask.post("/v1/embeddings", json=body | {"dimensions": 8}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(cut, plain[0, :8] / np.linalg.norm(plain[0, :8]), rtol=1e-5)


def test_embeddings_are_those_of_sentence_transformers(ask: Any, folders: dict[str, Path]) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["hi", "a longer text than that", "hi"]
    found = ask.post("/v1/embeddings", json={"model": "embeddings", "input": texts}).json()["data"]
    wanted = SentenceTransformer(str(folders["embeddings"]), device="cpu").encode(texts)
    np.testing.assert_allclose([row["embedding"] for row in found], wanted, atol=1e-5)


def test_documents_come_back_best_first_and_as_a_cross_encoder_scores_them(ask: Any, folders: dict[str, Path]) -> None:
    from sentence_transformers import CrossEncoder

    documents = ["one", "two words", "three of them"]
    body = {"query": "words", "documents": [*documents[:2], {"text": documents[2]}], "return_documents": True}
    found = ask.post("/v1/rerank", json=body).json()["results"]
    scores = CrossEncoder(str(folders["reranker"]), device="cpu").predict([("words", text) for text in documents])
    order = np.argsort(-scores)
    assert [row["index"] for row in found] == order.tolist()
    assert [row["document"]["text"] for row in found] == [documents[number] for number in order]
    np.testing.assert_allclose([row["relevance_score"] for row in found], scores[order], atol=1e-5)
    assert len(ask.post("/v2/rerank", json=body | {"top_n": 1}).json()["results"]) == 1


def test_a_reranker_that_was_trained_so_takes_documents_in_the_order_of_a_search(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["reranker"], tmp_path / "reranker")

    def relevance() -> np.ndarray:
        return asyncio.run(Encoder(ModelEntry(path=str(folder))).rerank("words", ["same", "same"]))[0]

    plain, card = relevance(), json.loads((folder / "model_card.json").read_text())
    (folder / "model_card.json").write_text(json.dumps(card | {"ordered": True}))
    found = relevance()
    odds = found / (1 - found)
    assert plain[0] == plain[1] == found[0] and odds[0] / odds[1] == pytest.approx(2**ORDER)


def test_documents_are_left_out_unless_they_are_asked_for_and_may_be_empty(ask: Any) -> None:
    body = {"query": "words", "documents": ["one", ""], "return_documents": None, "model": None, "top_n": None}
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        found = ask.post(path, json=body).json()["results"]
        assert [set(row) for row in found] == [{"index", "relevance_score"}] * 2
    kept = ask.post("/v1/rerank", json=body | {"return_documents": True}).json()["results"]
    assert {row["document"]["text"] for row in kept} == {"one", ""}


def test_a_fields_name_is_the_errors_param(ask: Any) -> None:
    for name, value in (("ignore_eos", True), ("tools", [{}]), ("top_k", 2**64), ("stop", [1])):
        error = ask.post("/v1/chat/completions", json={"model": "task_llm", "messages": HELLO, name: value}).json()
        assert error["error"]["param"] == name


def test_token_ids_of_the_models_own_tokenizer_are_texts(ask: Any, replicas: dict[str, Any]) -> None:
    tokenizer = replicas["embeddings"].holder.tokenizer.tokenizer
    texts = ["hi", "there"]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    body = {"model": "embeddings", "tokenizer": "embeddings", "encoding_format": None}
    found = ask.post("/v1/embeddings", json=body | {"input": ids}).json()["data"]
    wanted = ask.post("/v1/embeddings", json=body | {"input": tokenizer.batch_decode(ids)}).json()["data"]
    assert [row["embedding"] for row in found] == [row["embedding"] for row in wanted]
    assert len(ask.post("/v1/embeddings", json=body | {"input": ids[0]}).json()["data"]) == 1


def test_a_text_is_routed_with_alternatives_and_to_labels_of_the_request(ask: Any) -> None:
    [found] = ask.post("/v1/route", json={"input": "where is my card"}).json()["data"]
    assert found["label"] == "card" and not found["out_of_scope"]
    odds = [other["confidence"] for other in found["alternatives"]]
    assert len(odds) == 3 and odds == sorted(odds, reverse=True) and sum(odds) == pytest.approx(1)
    given = {"input": ["zebra", "apple"], "labels": {"z": "zebra", "a": "apple"}, "top_n": 1}
    assert [row["label"] for row in ask.post("/v1/route", json=given).json()["data"]] == ["z", "a"]


def test_chat_and_completions_answer_in_openais_form_and_greedy_is_always_the_same(ask: Any) -> None:
    body = {"model": "task_llm", "messages": HELLO, "temperature": 0, "max_tokens": 6}
    first, second = (ask.post("/v1/chat/completions", json=body).json() for _ in range(2))
    assert first["choices"] == second["choices"] and first["object"] == "chat.completion"
    assert first["usage"]["completion_tokens"] <= 6
    text = ask.post("/v1/completions", json={"model": "task_llm", "prompt": "a", "temperature": 0}).json()
    assert text["object"] == "text_completion" and isinstance(text["choices"][0]["text"], str)


def test_a_stream_says_what_the_whole_answer_says(ask: Any) -> None:
    body = {"model": "task_llm", "messages": HELLO, "temperature": 0}
    whole = ask.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    response = ask.post("/v1/chat/completions", json=body | {"stream": True})
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert response.headers["content-type"].startswith("text/event-stream") and events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(pieces) == whole


def test_images_are_asked_about_directly_and_in_a_chat(ask: Any) -> None:
    found = ask.post("/v1/vision", json={"image": picture(), "question": "what is it?"}).json()
    assert isinstance(found["text"], str) and "answer" in found
    parts = [
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture()}"}},
    ]
    body = {"model": "multimodal_vision", "messages": [{"role": "user", "content": parts}]}
    assert ask.post("/v1/chat/completions", json=body).status_code == 200
    refused = ask.post("/v1/chat/completions", json=body | {"model": "task_llm"})
    assert refused.status_code == 400 and "image_url" in message(refused)


def test_a_text_with_the_token_that_stands_for_images_is_refused(ask: Any) -> None:
    text = "what <image> is it?"
    seen = ask.post("/v1/vision", json={"image": picture(), "question": text})
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture()}"}}
    refused = [seen, ask.post("/v1/completions", json={"model": "multimodal_vision", "prompt": text})]
    for content in ([{"type": "text", "text": text}, shown], text):
        body = {"model": "multimodal_vision", "messages": [{"role": "user", "content": content}]}
        refused += [ask.post("/v1/chat/completions", json=body | {"stream": stream}) for stream in (False, True)]
    for response in refused:
        assert response.status_code == 400
        assert "text has <image> in it, which stands for images" in message(response)


def test_a_parse_points_into_the_text_as_it_was_sent(settings: Any) -> None:
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    class Parser:
        name = "parser"

        async def call(self, *arguments: Any) -> Any:
            return {"answer": [{"predicate": "likes", "ARG0": "She", "ARG1": "New York"}]}

    parsers: Any = {model.name: Parser() for model in settings.models}
    with TestClient(create_app(settings, parsers.__getitem__)) as client:
        [found] = client.post("/v1/parse", json={"input": "She likes New\nYork"}).json()["data"]
    assert found["frames"][0]["predicate"] == {"text": "likes", "start": 4, "end": 9}
    assert found["frames"][0]["roles"][1] == {"role": "ARG1", "text": "New York", "start": 10, "end": 18}


@pytest.mark.parametrize(("endpoint", "body"), [("parse", {"input": "he ran"}), ("extract", {"input": "Rome 1960"})])
def test_an_answer_that_is_no_json_is_said_to_be_none(ask: Any, endpoint: str, body: dict[str, Any]) -> None:
    response = ask.post(f"/v1/{endpoint}", json=body)  # by random weights, and no guided decoding here
    assert response.status_code == 422 and response.json()["error"]["code"] == "invalid_answer"


# Feedback, ids, figures


def test_feedback_is_kept_with_its_request_and_without_texts(ask: Any, settings: Any) -> None:
    answered = ask.post("/v1/route", json={"input": "a secret"}, headers={"x-request-id": "mine-1"})
    id = answered.headers["x-request-id"]
    assert ask.post("/v1/feedback", json={"request_id": id, "reward": -1.0, "correction": "fee"}).json()["recorded"]
    text = Path(settings.feedback).read_text()
    kept = json.loads(text)
    assert {
        "request_id": id,
        "model": "intent_router",
        "reward": -1.0,
        "correction": "fee",
    }.items() <= kept.items()
    assert "secret" not in text


def test_the_id_of_a_chat_takes_feedback_too(ask: Any) -> None:
    id = ask.post("/v1/chat/completions", json={"model": "task_llm", "messages": HELLO}).json()["id"]
    assert ask.post("/v1/feedback", json={"request_id": id, "reward": 1}).status_code == 200


def test_feedback_on_what_was_not_asked_here_is_refused(ask: Any) -> None:
    response = ask.post("/v1/feedback", json={"request_id": "unknown", "reward": 1})
    assert response.status_code == 404 and "unknown" in message(response)


def test_the_console_has_figures_of_the_requests_and_the_runs(ask: Any, settings: Any) -> None:
    ask.post("/v1/route", json={"input": "a"})
    live = ask.get("/console/live").json()
    assert live["models"]["intent_router"]["requests"] == 1 and live["under_way"] == {}
    journal = ask.app.state.journal
    journal.began("extractor")
    assert ask.get("/console/live").json()["under_way"] == {"extractor": 1}
    assert ask.get("/console/runs").json() == {"runs": []}
    assert ask.get("/console").headers["content-type"].startswith("text/html")


# What is refused


def asked(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


BAD = [
    ("embeddings", {"model": "embedding", "input": "a"}, 404, "did you mean 'embeddings'?"),
    ("embeddings", {"model": "task_llm", "input": "a"}, 400, "ask it at /v1/chat/completions"),
    ("embeddings", {"model": "embeddings", "input": []}, 400, "input: List should have at least 1 item"),
    ("embeddings", {"model": "embeddings", "input": ["a", " "]}, 400, "text 1 is empty"),
    ("embeddings", {"model": "embeddings", "input": "a", "dimensions": 99}, 400, "this model has 32"),
    ("embeddings", {"model": "embeddings", "input": "a\0b"}, 400, "NUL"),
    ("rerank", {"query": "a", "documents": []}, 400, "documents"),
    ("rerank", {"query": "a", "documents": ["a"] * 10_000}, 400, "10,000 texts; 2,048 are the most"),
    ("route", {"input": "a", "labels": {str(n): "a" for n in range(3000)}}, 400, "labels has 3,000 texts"),
    ("extract", {"input": "a", "schema": {"type": "nothing"}}, 400, "no JSON Schema"),
    ("extract", {"input": "a", "schema": {"type": "array", "properties": {}}}, 400, "an object with 'properties'"),
    ("extract", {"input": "a", "schema": {"type": "object"}}, 400, "an object with 'properties'"),
    *(
        ("extract", {"input": "a", "schema": {"properties": {"a": {"anyOf": [schema]}}}}, 400, said)
        for schema, said in (
            (NOWHERE, "http://127.0.0.1/schema.json', which is not in it"),
            ({"$dynamicRef": "file:///etc/hostname"}, "file:///etc/hostname', which is not in it"),
            ({"$ref": "#/nowhere"}, "#/nowhere', which is not in it"),
            ({"$ref": "#/properties/a/anyOf/0/$ref/deeper"}, "which is not in it"),
            (functools.reduce(lambda inner, _: {"not": inner}, range(300), {}), "nested too deeply"),
            ({"enum": list(range(3000))}, "more than 2,000 values"),
            ({"patternProperties": {"^(a+)+$": {}}}, "'patternProperties', which is not supported"),
        )
    ),
    ("completions", {"model": "task_llm", "prompt": "a", "response_format": asked(NOWHERE)}, 400, "is not in it"),
    ("chat/completions", {"model": "task_llm", "messages": HELLO, "response_format": asked(NOWHERE)}, 400, "not in it"),
    ("chat/completions", {"model": "task_llm", "messages": HELLO, "logprobs": True}, 400, "'logprobs' is not"),
    ("chat/completions", {"model": "task_llm", "messages": []}, 400, "messages"),
    ("chat/completions", {"model": "task_llm", "messages": HELLO, "temperature": 9}, 400, "temperature"),
    ("chat/completions", {"model": "task_llm", "messages": [{"role": "user", "content": "a" * 600}]}, 400, "context"),
    ("chat/completions", {"model": "task_llm", "messages": HELLO, "stop": "a"}, 400, "'stop' is not supported"),
    ("completions", {"model": "task_llm", "prompt": ""}, 400, "prompt"),
    ("completions", {"model": "task_llm", "prompt": ["a"] * 3000}, 400, "prompt has 3,000 texts; 2,048 are the most"),
    ("vision", {"image": "%%%"}, 400, "not valid base64"),
    ("vision", {"image": base64.b64encode(b"no image").decode()}, 400, "no image"),
    ("vision", {"image": picture(mode="CMYK", kind="JPEG")}, 400, "CMYK"),
    ("vision", {"image": "http://127.0.0.1/a.png"}, 400, "not fetched here"),
    ("vision", {"images": [picture()] * 9}, 400, "there are 9 images in one request; 8 are the most"),
    ("vision", {"images": [picture((7000, 4000))] * 2}, 400, "more than 50,000,000 pixels"),
    ("vision", {}, 400, "image"),
    ("feedback", {"request_id": "a"}, 400, "reward"),
    ("embeddings", {"model": "embeddings", "input": [15339, 1917]}, 400, "check_embedding_ctx_length=False"),
    ("embeddings", {"model": "embeddings", "input": [10**9], "tokenizer": "embeddings"}, 400, "no token 1000000000"),
    ("chat/completions", {"model": "task_llm", "messages": HELLO, "ignore_eos": True}, 400, "'ignore_eos'"),
    ("chat/completions", {"model": "task_llm", "messages": HELLO, "stop": list("abcde")}, 400, "4 are the most"),
    ("chat/completions", {"model": "task_llm", "messages": HELLO, "tools": [{}]}, 400, "tool calling is not supported"),
    ("chat/completions", {"model": "task_llm", "messages": [*HELLO, {"role": "user"}]}, 400, "messages.1: the content"),
    ("completions", {"model": "task_llm", "prompt": [1, 2]}, 400, "token ids"),
    ("completions", {"model": "task_llm", "prompt": "a", "max_tokens": 0}, 400, "'echo'"),
    ("responses", {"model": "task_llm", "input": "a"}, 404, "/v1/chat/completions"),
]


@pytest.mark.parametrize(("endpoint", "body", "status", "said"), BAD)
def test_bad_requests_get_one_clear_sentence(
    ask: Any, endpoint: str, body: dict[str, Any], status: int, said: str
) -> None:
    response = ask.post(f"/v1/{endpoint}", json=body)
    assert response.status_code == status
    assert said in message(response) and "\n" not in message(response)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_what_is_no_json_or_no_text_is_refused(ask: Any) -> None:
    surrogate = ask.post("/v1/route", content=b'{"input": "\\ud800"}', headers=JSON)
    assert surrogate.status_code == 400 and "surrogate" in message(surrogate)
    assert ask.post("/v1/route", content=b'{"input"', headers=JSON).status_code == 400
    wrong = ask.post("/v1/route", content=b"{}", headers={"content-type": "text/plain"})
    assert wrong.status_code == 415 and "application/json" in message(wrong)
    assert ask.get("/v1/nothing").status_code == 404 and ask.get("/v1/route").status_code == 405


def test_a_large_body_is_refused_whether_it_says_its_length_or_not(ask: Any, settings: Any) -> None:
    settings.limits.body_mib = 0.001
    body = json.dumps({"input": "a" * 2000}).encode()
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    with TestClient(create_app(settings, {}.__getitem__)) as client:
        assert client.post("/v1/route", content=body, headers=JSON).status_code == 413
        assert client.post("/v1/route", content=iter([body[:900], body[900:]]), headers=JSON).status_code == 413


def test_of_two_models_of_a_type_one_has_to_be_named(settings: Any, replicas: dict[str, Any]) -> None:
    from starlette.testclient import TestClient

    from serve.config import Served
    from serve.gateway import create_app

    settings.models.append(Served(name="second", model_type="intent_router", policy="ranking", created=1))
    with TestClient(create_app(settings, (replicas | {"second": replicas["intent_router"]}).__getitem__)) as client:
        response = client.post("/v1/route", json={"input": "a"})
        assert response.status_code == 400 and "there are intent_router, second" in message(response)
        assert client.post("/v1/route", json={"input": "a", "model": "second"}).json()["model"] == "second"


def test_an_answer_that_does_not_come_in_time_is_given_up(settings: Any) -> None:
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    class Asleep:
        name = "asleep"

        async def call(self, *arguments: Any) -> Any:
            await asyncio.sleep(60)

        async def stream(self, *arguments: Any) -> Any:
            yield "data: first\n\n"
            await asyncio.sleep(60)

    settings.limits.deadline_s = 0.1
    asleep: Any = {model.name: Asleep() for model in settings.models}
    with TestClient(create_app(settings, asleep.__getitem__)) as client:
        response = client.post("/v1/route", json={"input": "a"})
        assert response.status_code == 504 and "0.1 s" in message(response)
        chat = {"model": "task_llm", "messages": HELLO, "stream": True}
        first, last = client.post("/v1/chat/completions", json=chat).text.strip().split("\n\n")
        assert first == "data: first" and "0.1 s" in json.loads(last.removeprefix("data: "))["error"]["message"]


@pytest.mark.parametrize("error", [Refusal(503, "gone"), RuntimeError("a defect")])
def test_a_stream_that_fails_on_its_way_counts_as_failed(settings: Any, error: Exception) -> None:
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    class Dying:
        name = "dying"

        async def stream(self, *arguments: Any) -> Any:
            yield "data: first\n\n"
            raise error

    dying: Any = {model.name: Dying() for model in settings.models}
    with TestClient(create_app(settings, dying.__getitem__), raise_server_exceptions=False) as client:
        chat = {"model": "task_llm", "messages": HELLO, "stream": True}
        assert client.post("/v1/chat/completions", json=chat).status_code == 200
        assert client.get("/console/live").json()["models"]["task_llm"]["errors"] == 1


def test_a_defect_is_500_in_the_same_form_and_names_the_request(settings: Any) -> None:
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    with TestClient(create_app(settings, {}.__getitem__), raise_server_exceptions=False) as client:
        response = client.post("/v1/route", json={"input": "a"})
        assert response.status_code == 500 and response.headers["x-request-id"] in message(response)


def test_the_openapi_has_every_endpoint_and_our_form_of_errors_only(ask: Any) -> None:
    described = ask.get("/openapi.json").json()
    wanted = [
        "chat/completions",
        "completions",
        "models",
        "embeddings",
        "rerank",
        "route",
        "parse",
        "extract",
        "vision",
        "feedback",
    ]
    assert {f"/v1/{name}" for name in wanted} | {"/healthz", "/readyz"} <= set(described["paths"])
    chat = described["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(chat) == {"application/json", "text/event-stream"}
    assert "HTTPValidationError" not in described["components"]["schemas"]


def test_a_chat_is_led_by_the_instruction_of_the_training_where_it_has_none(replicas: dict[str, Any]) -> None:
    from srl_rlvr.model_types import task_llm

    holder, own = replicas["task_llm"].holder, [{"role": "system", "content": "mine"}, *HELLO]
    assert holder.instructed(HELLO) == [{"role": "system", "content": task_llm.TYPE.instruction}, *HELLO]
    assert holder.instructed(own) == own


def test_a_type_that_the_gateway_does_not_know_is_asked_by_chat(settings: Any, replicas: dict[str, Any]) -> None:
    from starlette.testclient import TestClient

    from serve.config import Served
    from serve.gateway import create_app

    settings.models.append(Served(name="eighth", model_type="summarizer", policy="text", created=1))
    with TestClient(create_app(settings, (replicas | {"eighth": replicas["task_llm"]}).__getitem__)) as client:
        assert client.post("/v1/chat/completions", json={"model": "eighth", "messages": HELLO}).status_code == 200
        refused = client.post("/v1/route", json={"model": "eighth", "input": "a"})
        assert refused.status_code == 400 and "ask it at /v1/chat/completions" in message(refused)


def test_sentences_go_to_the_parser_a_few_at_a_time_and_a_refusal_ends_the_others(settings: Any) -> None:
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    class Parser:
        name = "parser"
        asked = under_way = most = ended = 0

        async def call(self, method: str, row: dict[str, str]) -> Any:
            self.asked += 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            try:
                await asyncio.sleep(0.01)
                if row["text"] == "20":
                    raise Refusal(422, "the model's answer is no JSON", "invalid_answer")
                self.ended += 1
                return {"answer": []}
            finally:
                self.under_way -= 1

    parser = Parser()
    parsers: Any = dict.fromkeys((model.name for model in settings.models), parser)
    with TestClient(create_app(settings, parsers.__getitem__)) as client:
        assert len(client.post("/v1/parse", json={"input": ["a"] * 200}).json()["data"]) == 200
        assert parser.most == 16
        response = client.post("/v1/parse", json={"input": [str(number) for number in range(200)]})
    assert response.status_code == 422 and response.json()["error"]["code"] == "invalid_answer"
    assert parser.asked < 240 and parser.under_way == 0


def test_a_stream_has_its_usage_where_that_is_asked_for(ask: Any) -> None:
    body = {"model": "task_llm", "messages": HELLO, "temperature": 0, "stream": True, "max_tokens": 4}
    *_, last, done = ask.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
    assert done == "data: [DONE]" and "usage" not in json.loads(last.removeprefix("data: "))
    body["stream_options"] = {"include_usage": True}
    *_, last, done = ask.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
    found = json.loads(last.removeprefix("data: "))
    assert found["choices"] == [] and found["usage"]["completion_tokens"] >= 1


def test_texts_are_cut_to_what_the_encoder_takes_as_in_training(folders: dict[str, Path]) -> None:
    encoder = Encoder(ModelEntry(path=str(folders["embeddings"]), max_context=100_000))
    vectors, tokens = asyncio.run(encoder.embed(["a b " * 50_000, "short"], None))
    assert len(vectors) == 2 and tokens < 2 * encoder.tokenizer.max_context


def test_a_ranking_type_without_an_endpoint_is_said_to_have_none(settings: Any, replicas: dict[str, Any]) -> None:
    from starlette.testclient import TestClient

    from serve.config import Served
    from serve.gateway import create_app

    settings.models.append(Served(name="mine", model_type="my_ranker", policy="ranking", created=1))
    with TestClient(create_app(settings, replicas.__getitem__)) as client:
        response = client.post("/v1/rerank", json={"model": "mine", "query": "a", "documents": ["b"]})
    assert response.status_code == 400 and "no endpoint asks models of that type" in message(response)
