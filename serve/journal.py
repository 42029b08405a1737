"""What the gateway knows of the requests it answered: how many, how fast, and what was said of them afterwards.

Of a request it keeps its id, endpoint, model, status and time, never its texts.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.access import ANY_FEEDBACK, Bucket
from serve.errors import Refusal
from serve.seen import Seen, quantile
from srl_rlvr.api import FeedbackRequest

_REMEMBERED = 100_000  # requests that feedback can be given on
_WINDOW_S = 60.0
_KEPT = 20_000  # requests that figures are of
_LONGEST_LINE = 64 * 1024  # bytes of one feedback as it is kept
_FEEDBACK_PER_REQUEST = 10
_FEEDBACK_PER_MINUTE = 600  # of each key


@dataclass(frozen=True)
class Entry:
    id: str
    endpoint: str
    model: str
    version: str  # that answered
    status: int
    seconds: float
    at: float  # Unix time
    key: str = ""  # the name of the key that asked


class Journal:
    def __init__(self, feedback: Path):
        self.feedback = feedback
        self.recent: deque[Entry] = deque(maxlen=_KEPT)
        self.by_id: OrderedDict[str, Entry] = OrderedDict()
        self.since = time.time()
        self._given: dict[str, int] = {}  # how often feedback was given on a request
        self._buckets: dict[str, Bucket] = {}  # of feedback, by key
        self._writer = ThreadPoolExecutor(1, "feedback")
        self.seen: dict[str, Seen] = {}  # since `take_seen`
        self.under_way: Counter[str] = Counter()  # requests, by model

    def began(self, model: str) -> None:
        """A request to the model, until it is noted."""
        self.under_way[model] += 1

    def note(self, entry: Entry) -> None:
        if not entry.model:
            return
        self.under_way[entry.model] -= 1
        self.recent.append(entry)
        seen = self.seen.setdefault(entry.version, Seen())
        seen.add(Seen(1, int(entry.status >= 500), [entry.seconds]))
        self.by_id[entry.id] = entry
        while len(self.by_id) > _REMEMBERED:
            self._given.pop(self.by_id.popitem(last=False)[0], None)

    async def keep_feedback(self, given: FeedbackRequest, key: str, of_any: bool = False) -> None:
        """Write a line to the file. The last reward of a request counts, and only the key that asked it may give one,
        or one that may give it on `of_any` request. Raises Refusal: 400, 403, 404, 413, 429 or 503."""
        names = (given.request_id.removeprefix(prefix) for prefix in ("", "chatcmpl-", "cmpl-"))
        entry = next((self.by_id[name] for name in names if name in self.by_id), None)
        if entry is None:
            raise Refusal(404, f"no request '{given.request_id}' was answered here lately", "request_not_found",
                          "request_id")  # fmt: skip
        if entry.key != key and not of_any:
            raise Refusal(403, f"another key asked request '{given.request_id}'; feedback on it needs that key, or one "
                               f"with the scope {ANY_FEEDBACK}", param="request_id")  # fmt: skip
        line = _line(given, entry, key)
        self._admit(entry.id, key)
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._write, line)
        except OSError as error:
            raise Refusal(503, f"feedback cannot be kept: {error.strerror}", retry_after=60) from None
        if given.reward is not None:
            self.seen.setdefault(entry.version, Seen()).add(Seen(rewards={entry.id: given.reward}))

    def _admit(self, request: str, key: str) -> None:
        if self._given.get(request, 0) >= _FEEDBACK_PER_REQUEST:
            raise Refusal(429, f"feedback was given {_FEEDBACK_PER_REQUEST} times on this request, which is the most",
                          "rate_limit_exceeded", "request_id")  # fmt: skip
        wait = self._buckets.setdefault(key, Bucket(_FEEDBACK_PER_MINUTE)).take()
        if wait:
            raise Refusal(429, f"more than {_FEEDBACK_PER_MINUTE} times feedback in a minute; retry in {wait:.0f} s",
                          "rate_limit_exceeded", retry_after=wait)  # fmt: skip
        self._given[request] = self._given.get(request, 0) + 1

    def _write(self, line: bytes) -> None:
        self.feedback.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(self.feedback, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                os.fchmod(file.fileno(), 0o600)
            file.write(line)

    def take_seen(self) -> dict[str, Seen]:
        """Of each version what was answered since the last call."""
        seen, self.seen = self.seen, {}
        return seen

    def live(self) -> dict[str, Any]:
        """Of the last minute, by model: requests a second, seconds that half and 95 % of them took less than, and the
        share that failed (status 500 and above). Beside them the requests that wait or are being answered now."""
        now = time.time()
        window = min(_WINDOW_S, max(now - self.since, 1.0))
        of: dict[str, list[Entry]] = {}
        for entry in self.recent:
            if now - entry.at <= window:
                of.setdefault(entry.model, []).append(entry)
        return {
            "seconds": round(window, 1),
            "under_way": +self.under_way,
            "models": {
                name: {
                    "requests": len(entries),
                    "per_second": round(len(entries) / window, 3),
                    "p50_s": round(quantile([entry.seconds for entry in entries], 0.5), 4),
                    "p95_s": round(quantile([entry.seconds for entry in entries], 0.95), 4),
                    "errors": sum(entry.status >= 500 for entry in entries) / len(entries),
                }
                for name, entries in sorted(of.items())
            },
        }


def _line(given: FeedbackRequest, entry: Entry, key: str) -> bytes:
    """As it is kept. Raises Refusal if it is no JSON or too long."""
    line = {"request_id": entry.id, "endpoint": entry.endpoint, "model": entry.model, "at": round(time.time(), 3)}
    line |= {name: value for name, value in given.model_dump().items() if name != "request_id" and value is not None}
    line |= {"key": key} if key else {}
    try:
        written = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except ValueError:
        raise Refusal(400, "correction: a number in it is not finite, which JSON has not", param="correction") from None
    if len(written) > _LONGEST_LINE:
        raise Refusal(413, f"correction and comment have {len(written):,} bytes; {_LONGEST_LINE:,} are the most",
                      param="correction")  # fmt: skip
    return written
