"""What a replica holds to whatever runs beside it."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from serve.config import ModelEntry
from serve.errors import Refusal
from serve.replicas import Holder, PlainWriter, Wanted, own_thread
from srl_rlvr.policies import base_models

HELLO = [{"role": "user", "content": "hi"}]
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat(writer: Any, **body: Any) -> Any:
    return asyncio.run(writer.on("", "chat", {"model": "m", "messages": HELLO, "request_id": "1"} | body))


@pytest.fixture(scope="module")
def writer(folders: dict[str, Path]) -> PlainWriter:
    return PlainWriter(ModelEntry(path=str(folders["task_llm"])))


def test_a_refusal_is_returned_and_nothing_is_logged(writer: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    found = chat(writer, messages=[{"role": "user", "content": "secret " * 600}])
    assert isinstance(found, Refusal) and found.status == 400

    async def stream() -> list[Any]:
        body = {"model": "m", "messages": [{"role": "user", "content": "a" * 600}], "request_id": "1"}
        return [item async for item in writer.stream_on("", "chat_stream", body)]

    assert [type(item) for item in asyncio.run(stream())] == [Refusal]
    assert "secret" not in caplog.text


def test_a_defect_is_raised() -> None:
    class Broken(Holder):
        async def chat(self) -> None:
            raise RuntimeError("a defect")

    with pytest.raises(RuntimeError):
        asyncio.run(Broken().on("", "chat"))


def test_a_seed_gives_the_same_answer_alone_and_beside_others(writer: Any) -> None:
    tokens = (40, 41, 42)
    mine = Wanted(tokens, 12, 1.0, seed=7)
    alone = writer._sample([mine])[0]
    others = [Wanted(tokens, 12, 1.0, seed=seed) for seed in (7, 1, 2, 7)]
    longer = Wanted((*tokens, 50, 51), 12, 1.0, seed=7)
    found = writer._sample([others[1], longer, mine, *others, Wanted(tokens, 5, 0.5, seed=7)])
    assert found[2] == found[3] == found[6] == alone
    assert found[0] == found[4] != alone and found[5] != alone


def test_several_answers_are_written_and_greedy_ones_are_alike(writer: Any) -> None:
    greedy = chat(writer, n=2, temperature=0)["choices"]
    assert [choice["index"] for choice in greedy] == [0, 1]
    assert greedy[0]["message"] == greedy[1]["message"]
    sampled = chat(writer, n=3, seed=1, temperature=1)
    texts = [choice["message"]["content"] for choice in sampled["choices"]]
    assert len(set(texts)) > 1
    assert texts == [choice["message"]["content"] for choice in chat(writer, n=3, seed=1, temperature=1)["choices"]]
    assert sampled["usage"]["completion_tokens"] > 12 - 1


def test_several_prompts_are_completed_in_their_order(writer: Any) -> None:
    def complete(prompt: Any, n: int = 1) -> Any:
        body = {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 4, "n": n, "request_id": "1"}
        return asyncio.run(writer.on("", "complete", body))

    alone = [complete(text)["choices"][0]["text"] for text in ("a b", "c")]
    found = complete(["a b", "c"], n=2)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in found["choices"]] == [alone[0], alone[0], alone[1], alone[1]]
    assert found["usage"]["prompt_tokens"] == len("a bc")


def test_a_limit_above_the_context_is_cut(writer: Any) -> None:
    found = chat(writer, max_tokens=10**6, temperature=0, seed=1)
    assert found["usage"]["total_tokens"] <= writer.model.max_context


@pytest.mark.parametrize(
    "name", ["stop", "logit_bias", "top_p", "top_k", "min_p", "logprobs", "top_logprobs", "repetition_penalty"]
)
def test_what_only_vllm_does_is_refused_by_name(writer: Any, name: str) -> None:
    found = chat(writer, **{name: {"1": 1} if name == "logit_bias" else 0.5})
    assert isinstance(found, Refusal) and found.status == 400 and found.param == name


def test_a_template_without_a_system_role_gets_the_instruction_before_the_question(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["task_llm"], tmp_path / "strict")
    tokenizer = base_models.load_tokenizer(folder)
    tokenizer.chat_template = NO_SYSTEM
    tokenizer.save_pretrained(folder)
    strict: Any = PlainWriter(ModelEntry(path=str(folder)))
    tokens, _ = strict._conversation(HELLO)
    shown = strict.tokenizer.decode(tokens)
    assert shown.startswith("<|user|>") and strict.model.model_type.instruction[:20] in shown
    assert chat(strict, messages=[{"role": "system", "content": "Be brief."}, *HELLO])["choices"]
    refused = chat(strict, messages=[*HELLO, *HELLO])
    assert isinstance(refused, Refusal) and refused.status == 400 and "alternate" in refused.message


def test_content_that_the_model_cannot_read_is_refused_at_the_clients_own_place(writer: Any) -> None:
    for part in ({"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "x" * 10**6}, {"type": "text"}, {}):
        found = chat(writer, messages=[*HELLO, {"role": "user", "content": [part]}])
        assert isinstance(found, Refusal) and found.status == 400 and "messages.1" in found.message
        assert len(found.message) < 200 and "/" not in found.message


def test_a_schema_that_takes_for_ever_to_check_holds_up_nobody(writer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.replicas._CHECK_S", 0.5)
    defs: Any = {f"d{n}": {"oneOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(25)}
    doubled = {"$ref": "#/$defs/d0", "$defs": defs | {"d25": {"type": "object"}}}

    async def run() -> float:
        await writer.fitted("{}", {"type": "object"})  # the process is there
        longest, before = 0.0, time.monotonic()
        work = asyncio.create_task(writer.fitted("{}", doubled))
        while not work.done():
            await asyncio.sleep(0.01)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
        with pytest.raises(Refusal) as found:
            await work
        assert found.value.status == 400 and found.value.param == "schema"
        assert await writer.fitted("{}", {"type": "object"}) == ("{}", False)
        return longest

    assert asyncio.run(run()) < 0.4


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"properties": {"a": {"multipleOf": 1e-300}}},
        {"properties": {"a": {"minimum": 10**4000}}},
    ],
)
def test_a_schema_that_cannot_be_checked_is_no_defect(writer: Any, schema: dict[str, Any]) -> None:
    try:
        found = asyncio.run(writer.fitted('{"a": 1e300}', schema))
        assert found == ('{"a": 1e300}', False)
    except Refusal as refusal:
        assert refusal.status in (400, 422) and "\n" not in refusal.message


def test_work_keeps_its_thread() -> None:
    work = own_thread(threading.get_ident, "mine")

    async def run() -> set[int]:
        return set(await asyncio.gather(*(work() for _ in range(20))))

    assert len(asyncio.run(run())) == 1


def test_an_encoder_decodes_its_own_tokens_and_refuses_others(replicas: dict[str, Any]) -> None:
    encoder = replicas["embeddings"].holder
    [ids] = encoder.tokenize(("hello there",))
    [text] = asyncio.run(encoder.decode([list(ids)]))
    assert json.dumps(text)
    for wrong in ([10**9], []):
        found = asyncio.run(encoder.on("", "decode", [wrong]))
        assert isinstance(found, Refusal) and found.status == 400 and found.param == "input"
