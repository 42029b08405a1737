"""What the gateway knows of the requests it answered: how many, how fast, and what was said of them afterwards.

Of a request it keeps its id, endpoint, model, status and time, never its texts.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import Refusal
from serve.seen import Seen, quantile
from srl_rlvr.api import FeedbackRequest

_REMEMBERED = 100_000  # requests that feedback can be given on
_WINDOW_S = 60.0
_KEPT = 20_000  # requests that figures are of


@dataclass(frozen=True)
class Entry:
    id: str
    endpoint: str
    model: str
    version: str  # that answered
    status: int
    seconds: float
    at: float  # Unix time


class Journal:
    def __init__(self, feedback: Path):
        self.feedback = feedback
        self.recent: deque[Entry] = deque(maxlen=_KEPT)
        self.by_id: OrderedDict[str, Entry] = OrderedDict()
        self.since = time.time()
        self._writing = threading.Lock()
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
            self.by_id.popitem(last=False)

    def keep_feedback(self, given: FeedbackRequest, key: str) -> None:
        """A line in the file. Raises Refusal where the request is not known."""
        names = (given.request_id.removeprefix(prefix) for prefix in ("", "chatcmpl-", "cmpl-"))
        entry = next((self.by_id[name] for name in names if name in self.by_id), None)
        if entry is None:
            raise Refusal(404, f"no request '{given.request_id}' was answered here lately", "request_not_found",
                          "request_id")  # fmt: skip
        line = {"request_id": entry.id, "endpoint": entry.endpoint, "model": entry.model, "at": round(time.time(), 3)}
        line |= {
            name: value for name, value in given.model_dump().items() if name != "request_id" and value is not None
        }
        line |= {"key": key} if key else {}
        try:
            written = json.dumps(line, ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise Refusal(
                400, "correction: a number in it is not finite, which JSON has not", param="correction"
            ) from None
        if given.reward is not None:
            self.seen.setdefault(entry.version, Seen()).rewards.append(given.reward)
        with self._writing:
            self.feedback.parent.mkdir(parents=True, exist_ok=True)
            with self.feedback.open("a", encoding="utf-8") as file:
                file.write(written + "\n")

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
