"""Which requests fit their forms: fields, bounds, and null in the place of what is left out."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from pydantic import ValidationError

from srl_rlvr import api

HELLO = [{"role": "user", "content": "hi"}]
CHAT = {"model": "m", "messages": HELLO}
COMPLETION = {"model": "m", "prompt": "hi"}


def fault(form: Any, body: dict[str, Any]) -> tuple[Any, str]:
    """The field that is named, and what is said."""
    with pytest.raises(ValidationError) as found:
        form.model_validate(body)
    first = found.value.errors()[0]
    return next(iter(first["loc"]), first.get("ctx", {}).get("field")), first["msg"]


@pytest.mark.parametrize(
    "name",
    [
        "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "ignore_eos",
        "min_tokens", "use_beam_search", "prompt_logprobs", "priority", "vllm_xargs", "mm_processor_kwargs",
        "chat_template", "chat_template_kwargs", "add_generation_prompt", "stop_token_ids", "allowed_token_ids",
        "bad_words", "request_id", "cache_salt", "kv_transfer_params", "logprob_token_ids", "truncate_prompt_tokens",
        "thinking_token_budget", "repetition_detection", "prompt_embeds", "no_such_field",
    ],
)  # fmt: skip
def test_a_field_of_the_engine_is_refused_by_name_and_taken_if_it_is_null(name: str) -> None:
    for form, body in ((api.ChatRequest, CHAT), (api.CompletionRequest, COMPLETION)):
        for value in (1, "a", True, {}, [], 0):
            field, said = fault(form, body | {name: value})
            assert field == name and f"'{name}'" in said
        assert name not in form.model_validate(body | {name: None}).model_dump(exclude_unset=True)


def test_the_name_of_an_unknown_field_is_cut() -> None:
    field, said = fault(api.ChatRequest, CHAT | {"a" * 10**6: 1})
    assert len(said) < 300 and len(field) < 300


def test_no_field_of_vllm_is_taken_by_chance() -> None:
    protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")
    completion = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
    known = {
        "messages", "prompt", "model", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "n",
        "seed", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "logprobs", "stop",
        "top_logprobs", "max_tokens", "max_completion_tokens", "response_format", "echo", "user", "tools",
        "tool_choice", "parallel_tool_calls", "reasoning_effort",
    }  # fmt: skip
    for form, theirs in (
        (api.ChatRequest, protocol.ChatCompletionRequest),
        (api.CompletionRequest, completion.CompletionRequest),
    ):
        assert set(theirs.model_fields) & set(form.model_fields) <= known


@pytest.mark.parametrize(
    "more",
    [
        {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "store": False, "parallel_tool_calls": True},
        {"reasoning_effort": "low", "verbosity": "low", "safety_identifier": "a", "prompt_cache_key": "a"},
        {"tools": [], "tool_choice": "auto", "functions": [], "function_call": "none", "modalities": ["text"]},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        dict.fromkeys(("stop", "n", "seed", "top_p", "stream", "tools", "logit_bias", "max_tokens", "store", "audio")),
        {"stop": ""},
        {"stop": []},
    ],
)
def test_what_clients_send_by_default_is_taken_and_goes_no_farther(more: dict[str, Any]) -> None:
    sent = api.ChatRequest.model_validate(CHAT | more).model_dump(exclude_unset=True)
    assert {name: value for name, value in sent.items() if value is not None} == CHAT


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tool_calling_is_refused_in_one_sentence(name: str) -> None:
    field, said = fault(api.ChatRequest, CHAT | {name: [{"type": "function"}]})
    assert field == name and "tool calling is not supported" in said and "--" not in said


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("top_k", [2**31, 2**63, 2**64, 10**30, -2]),
        ("seed", [2**63, 2**64, -(2**63) - 1]),
        ("n", [0, 17, 10**30]),
        ("min_p", [-1, 2]),
        ("repetition_penalty", [0, 11]),
        ("frequency_penalty", [3]),
        ("presence_penalty", [-3]),
        ("logit_bias", [{str(n): 1 for n in range(301)}, {"a": 1}, {"1": 101}, {"-1": 1}, {"9" * 30: 1}]),
        ("stop", [list("abcde"), [""], ["a", 1], 1, "a" * 1001]),
        ("max_tokens", [-1, "a"]),
        ("store", [True]),
        ("stream_options", [1]),
    ],
)
def test_values_out_of_bounds_are_refused_with_the_fields_name(name: str, values: list[Any]) -> None:
    for value in values:
        for form, body in ((api.ChatRequest, CHAT), (api.CompletionRequest, COMPLETION)):
            field, said = fault(form, body | {name: value})
            assert field == name and len(said) < 300


def test_logprobs_have_the_bounds_of_their_endpoint() -> None:
    assert fault(api.ChatRequest, CHAT | {"logprobs": True, "top_logprobs": 21})[0] == "top_logprobs"
    assert "logprobs" in fault(api.ChatRequest, CHAT | {"top_logprobs": 2})[1]
    assert fault(api.CompletionRequest, COMPLETION | {"logprobs": 6})[0] == "logprobs"
    assert api.CompletionRequest.model_validate(COMPLETION | {"max_tokens": 0, "echo": True, "logprobs": 1})
    assert "echo" in fault(api.CompletionRequest, COMPLETION | {"max_tokens": 0})[1]


@pytest.mark.parametrize("role", ["system", "user", "developer", "tool"])
def test_a_message_without_content_is_refused_at_its_place(role: str) -> None:
    with pytest.raises(ValidationError) as found:
        api.ChatRequest.model_validate(CHAT | {"messages": [*HELLO, {"role": role, "content": None}]})
    assert found.value.errors()[0]["loc"][:2] == ("messages", 1)


def test_an_answer_that_comes_back_is_taken_and_its_other_fields_are_left_out() -> None:
    answer = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "x": 1}
    sent = api.ChatRequest.model_validate(CHAT | {"messages": [*HELLO, answer]}).model_dump(exclude_unset=True)
    assert set(sent["messages"][1]) == {"role", "content"}


@pytest.mark.parametrize(
    ("form", "body", "name"),
    [
        (api.EmbeddingsRequest, {"model": "m", "input": "a"}, "encoding_format"),
        (api.EmbeddingsRequest, {"model": "m", "input": "a"}, "dimensions"),
        (api.RerankRequest, {"query": "a", "documents": ["b"]}, "return_documents"),
        (api.RerankRequest, {"query": "a", "documents": ["b"]}, "model"),
        (api.RouteRequest, {"input": "a"}, "top_n"),
        (api.ExtractRequest, {"input": "a"}, "schema"),
        (api.VisionRequest, {"image": "a"}, "images"),
        (api.FeedbackRequest, {"request_id": "a", "reward": 1}, "comment"),
    ],
)
def test_null_is_as_if_it_were_left_out(form: Any, body: dict[str, Any], name: str) -> None:
    assert form.model_validate(body | {name: None}) == form.model_validate(body)


def test_every_optional_field_of_every_request_may_be_null_and_no_required_one() -> None:
    forms = [found for found in vars(api).values() if isinstance(found, type) and issubclass(found, api.Request)]
    assert len(forms) > 8
    for form in forms:
        optional = [field.alias or name for name, field in form.model_fields.items() if not field.is_required()]
        required = [name for name, field in form.model_fields.items() if field.is_required()]
        assert form._given(dict.fromkeys([*optional, *required])) == dict.fromkeys(required)


@pytest.mark.parametrize("ids", [[1, 2], [[1, 2], [3]]])
def test_token_ids_are_taken_only_of_the_tokenizer_that_is_named(ids: Any) -> None:
    body = {"model": "m", "input": ids}
    for given in (body, body | {"tokenizer": "cl100k_base"}):
        field, said = fault(api.EmbeddingsRequest, given)
        assert field == "input" and "check_embedding_ctx_length=False" in said
    assert api.EmbeddingsRequest.model_validate(body | {"tokenizer": "m"}).input == ids
    assert "token ids" in fault(api.CompletionRequest, COMPLETION | {"prompt": ids})[1]


@pytest.mark.parametrize("wrong", [[], [[]], ["a", 1], [1, "a"], [[1], "a"], [-1], [2**40], 1, {}])
def test_an_input_of_another_form_is_refused(wrong: Any) -> None:
    assert fault(api.EmbeddingsRequest, {"model": "m", "input": wrong, "tokenizer": "m"})[0] == "input"


@pytest.mark.parametrize("levels", [101, 700])
def test_a_request_that_is_nested_too_deeply_is_refused_in_whatever_field(levels: int) -> None:
    deep: Any = functools.reduce(lambda inner, _: [inner], range(levels), 1)
    for form, body in (
        (api.ChatRequest, CHAT | {"metadata": deep}),
        (api.ChatRequest, CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "x": deep}]}]}),
        (api.FeedbackRequest, {"request_id": "a", "correction": deep}),
        (api.ExtractRequest, {"input": "a", "schema": {"x": deep}}),
        (api.RouteRequest, {"input": "a", "ignored": deep}),
    ):
        assert "nested too deeply" in fault(form, body)[1]


def test_a_comment_alone_is_feedback() -> None:
    assert api.FeedbackRequest(request_id="a", comment="too long").comment
