from __future__ import annotations

import asyncio
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from serve import journal as journals
from serve.errors import Refusal
from serve.journal import Entry, Journal
from srl_rlvr.api import FeedbackRequest


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    found = Journal(tmp_path / "serve" / "feedback.jsonl")
    for id, key in (("req-1", "alice"), ("req-2", "alice"), ("req-3", "")):
        found.note(Entry(id, "/v1/route", "router", "router/router", 200, 0.1, 0.0, key))
    found.take_seen()
    return found


def give(journal: Journal, id: str = "req-1", key: str = "alice", of_any: bool = False, **given: Any) -> None:
    asyncio.run(journal.keep_feedback(FeedbackRequest(request_id=id, **given), key, of_any))


def refused(journal: Journal, *of: Any, **given: Any) -> int:
    with pytest.raises(Refusal) as found:
        give(journal, *of, **given)
    return found.value.status


def lines(journal: Journal) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.feedback.read_bytes().splitlines()]


def test_a_request_has_one_reward_and_the_last_one_counts(journal: Journal) -> None:
    for reward in (-1.0, -1.0, 0.5):
        give(journal, reward=reward)
    give(journal, id="chatcmpl-req-2", reward=1)
    give(journal, correction="fee")
    assert journal.take_seen()["router/router"].rewards == {"req-1": 0.5, "req-2": 1.0}
    give(journal, reward=-0.5)
    assert journal.take_seen()["router/router"].rewards == {"req-1": -0.5}
    assert [line.get("reward") for line in lines(journal)] == [-1.0, -1.0, 0.5, 1.0, None, -0.5]


@pytest.mark.parametrize("key", ["bob", "", "Alice"])
def test_another_key_gives_no_feedback_unless_it_may_on_any(journal: Journal, key: str) -> None:
    assert refused(journal, key=key, reward=-1) == 403
    assert journal.take_seen() == {} and not journal.feedback.exists()
    give(journal, key=key, of_any=True, reward=-1)
    assert journal.take_seen()["router/router"].rewards == {"req-1": -1.0}


def test_without_keys_everyone_is_the_same(journal: Journal) -> None:
    give(journal, id="req-3", key="", reward=1)
    assert refused(journal, id="req-4", key="", reward=1) == 404


def test_a_large_correction_is_refused_and_never_written(journal: Journal) -> None:
    for correction in ("x" * 15_000_000, {"a": ["é" * 100] * 1000}, ["x"] * 20_000):
        assert refused(journal, correction=correction) == 413
    give(journal, correction="x" * 60_000, comment="fine")
    assert len(lines(journal)) == 1


def test_feedback_on_one_request_and_by_one_key_has_an_end(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(10):
        give(journal, reward=-1)
    assert refused(journal, reward=-1) == 429
    monkeypatch.setattr(journals, "_FEEDBACK_PER_MINUTE", 2)
    journal._buckets.clear()
    give(journal, id="req-2", reward=1)
    give(journal, id="req-2", reward=1)
    with pytest.raises(Refusal) as found:
        give(journal, id="req-2", reward=1)
    assert found.value.status == 429 and found.value.retry_after


def test_the_file_is_its_owners_alone(journal: Journal) -> None:
    before = os.umask(0)
    try:
        give(journal, reward=1)
        assert stat.S_IMODE(journal.feedback.stat().st_mode) == 0o600
        journal.feedback.chmod(0o644)
        give(journal, reward=1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(journal.feedback.stat().st_mode) == 0o600 and len(lines(journal)) == 2


def test_a_file_that_cannot_be_written_is_a_503_and_counts_for_nothing(journal: Journal) -> None:
    journal.feedback.mkdir(parents=True)
    assert refused(journal, reward=1) == 503
    assert journal.take_seen() == {}


def test_nothing_in_a_text_begins_another_line(journal: Journal) -> None:
    give(journal, correction='a\n{"request_id": "forged"}\u2028\x1b[31m')
    assert len(journal.feedback.read_bytes().splitlines()) == 1 and lines(journal)[0]["request_id"] == "req-1"


def test_the_file_is_written_off_the_event_loop(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, write = threading.Event(), journal._write

    def slow(line: bytes) -> None:
        assert go_on.wait(10)
        write(line)

    async def run() -> None:
        task = asyncio.create_task(journal.keep_feedback(FeedbackRequest(request_id="req-1", reward=1), "alice"))
        await asyncio.sleep(0.01)  # the loop goes on
        assert not task.done()
        go_on.set()
        await task

    monkeypatch.setattr(journal, "_write", slow)
    asyncio.run(run())
