"""One attacker of each kind, each in a thread, for `serving_attack.py`.

python _attackers.py '{"port": 8000, "seconds": 60}'

Each sends its request, waits for the answer or leaves, rests, and sends again; prints one JSON line: what each was
answered, and how often. They know the open API only, and have no key.
"""

from __future__ import annotations

import base64
import http.client
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

MIB = 2**20
_FRAMES = 60_000  # of a TIFF of 4 MiB
_DOUBLED = 25
_CHOICES = 40_000


class Attack:
    def __init__(self, port: int, seconds: float):
        self.port, self.until = port, time.monotonic() + seconds
        self.answers: dict[str, Counter[str]] = {}

    def run(self) -> dict[str, dict[str, int]]:
        threads = [threading.Thread(target=self._again_and_again, args=(kind,), daemon=True) for kind in KINDS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self.until + 5 - time.monotonic()))
        return {kind: dict(of) for kind, of in sorted(self.answers.items())}

    def _again_and_again(self, kind: str) -> None:
        send, rest_s = KINDS[kind]
        found = self.answers[kind] = Counter()
        while time.monotonic() < self.until:
            for answer in send(self):
                found[answer] += 1
            time.sleep(max(0.0, min(rest_s, self.until - time.monotonic())))

    def post(self, path: str, body: bytes, timeout: float) -> str:
        """The status, or how it ended."""
        timeout = max(0.1, min(timeout, self.until - time.monotonic()))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", path, body, {"content-type": "application/json"})
            return str(connection.getresponse().status)
        except TimeoutError:
            return "left"
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__
        finally:
            connection.close()

    def at_once(self, path: str, body: bytes, count: int, timeout: float) -> list[str]:
        found: list[str] = []
        threads = [
            threading.Thread(target=lambda: found.append(self.post(path, body, timeout)), daemon=True)
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def open(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)


def large_bodies(attack: Attack) -> list[str]:
    """Eight of 0.6 MiB that may be joined to one call, and one of 4.5 MiB."""
    joined = _json({"query": "a", "documents": ["word " * 1200] * 100})
    alone = _json({"query": "a", "documents": ["word " * 1000] * 900})
    return [*attack.at_once("/v1/rerank", joined, 8, 30), attack.post("/v1/rerank", alone, 30)]


def image_chains(attack: Attack) -> list[str]:
    """Six images at once of 60,000 directories each."""
    body = _json({"image": base64.b64encode(_tiff_chain(_FRAMES)).decode(), "question": "what?"})
    return attack.at_once("/v1/vision", body, 6, 20)


def doubled_schemas(attack: Attack) -> list[str]:
    """A schema of 2 kB that an answer is checked against 2^25 times."""
    links: dict[str, Any] = {
        f"d{i}": {"oneOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]} for i in range(_DOUBLED)
    }
    links[f"d{_DOUBLED}"] = {"type": "string"}
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}}, "required": ["a"], "$defs": links}
    return [attack.post("/v1/extract", _json({"input": "x", "schema": schema}), 5)]


def many_choices(attack: Attack) -> list[str]:
    """A choice among 40,000 texts, which is compiled in quadratic time."""
    choice = [f"choice {number} {random.random()}" for number in range(_CHOICES)]
    asked = {"model": "task_llm", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    return [attack.post("/v1/chat/completions", _json(asked | {"structured_outputs": {"choice": choice}}), 10)]


def many_prompts(attack: Attack) -> list[str]:
    """16,000 answers of 400 tokens by one request."""
    asked = {"model": "task_llm", "prompt": ["a"] * 1000, "n": 16, "max_tokens": 400}
    return [attack.post("/v1/completions", _json(asked), 30)]


def open_paths(attack: Attack) -> list[str]:
    """40 bodies of 20 MiB that do not end, a head of 100 MiB, and heads, bodies and silence that go on for 15 s."""
    size = 20 * MIB
    large = b"x" * (size - 1)
    head = f"POST /healthz HTTP/1.1\r\nhost: localhost\r\ncontent-length: {size}\r\n\r\n".encode()
    begun = [head + large] * 40 + [b"GET /healthz HTTP/1.1\r\nx-a: " + b"a" * (100 * MIB)]
    slow = [b"GET /healthz HTTP/1.1\r\n", b"", b"POST /v1/embeddings HTTP/1.1\r\ncontent-length: 1000\r\n\r\n"] * 5
    held, found = [], []
    for sent in begun + slow:
        if time.monotonic() > attack.until:
            break
        try:
            held.append(connection := attack.open())
            connection.sendall(sent)
        except OSError as error:
            found.append(type(error).__name__)
    until = min(time.monotonic() + 15, attack.until)
    while time.monotonic() < until:
        time.sleep(1)
        for connection in held[-len(slow) :]:
            try:
                connection.send(b"x-a: b\r\n")
            except OSError:
                continue
    for connection in held:
        found.append(_state(connection))
        connection.close()
    return found


def large_json(attack: Attack) -> list[str]:
    """Bodies of 20 MB that hold millions of values."""
    begins = b'{"model":"embeddings","input":"a","x":['
    bodies = (begins + b"0," * 9_900_000 + b"0]}", begins + b"{}," * 6_500_000 + b"{}]}")
    return [attack.post("/v1/embeddings", body, 30) for body in bodies]


KINDS: dict[str, tuple[Callable[[Attack], list[str]], float]] = {  # and the seconds of rest between two
    "large bodies": (large_bodies, 5.0),
    "image chains": (image_chains, 2.0),
    "doubled schemas": (doubled_schemas, 1.0),
    "many choices": (many_choices, 1.0),
    "many prompts": (many_prompts, 1.0),
    "open paths": (open_paths, 2.0),
    "large JSON": (large_json, 2.0),
}


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _state(connection: socket.socket) -> str:
    """The status that it was answered with, or whether it still stands."""
    connection.setblocking(False)
    try:
        answer = connection.recv(12).decode("latin-1")
    except BlockingIOError:
        return "held open"
    except OSError as error:
        return type(error).__name__
    return answer[9:12] if answer else "closed"


def _tiff_chain(directories: int) -> bytes:
    """Return a TIFF of one pixel with a chain of `directories` directories."""
    tags = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8)]
    written = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    size, first = len(written) + 4, 16
    chain = [b"II*\0" + struct.pack("<I", first) + b"\0" * 8]
    for number in range(1, directories + 1):
        chain.append(written + struct.pack("<I", first + number * size if number < directories else 0))
    return b"".join(chain)


if __name__ == "__main__":
    print(json.dumps(Attack(**json.loads(sys.argv[1])).run()), flush=True)
