from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from serve.access import ANY_FEEDBACK, Bucket, Doorkeeper, new_key, read, revoke, table
from serve.errors import Refusal
from srl_rlvr.errors import InputError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def refusal(door: Doorkeeper, token: str, scope: str = "chat") -> Refusal:
    with pytest.raises(Refusal) as found:
        door.admit(f"Bearer {token}", scope)
    return found.value


def test_a_key_is_kept_as_its_hash_in_a_file_that_others_cannot_read(file: Path) -> None:
    token = new_key(file, "phone")
    assert token not in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Doorkeeper(str(file), 0).admit(f"Bearer {token}", "chat") == "phone"
    assert Doorkeeper(str(file), 0).admit(f"bearer {token}", "chat") == "phone"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer srl-wrong", "Basic abc"])
def test_without_a_valid_key_nobody_is_let_in(file: Path, header: str) -> None:
    new_key(file, "phone")
    with pytest.raises(Refusal) as found:
        Doorkeeper(str(file), 0).admit(header, "chat")
    assert found.value.status == 401


def test_a_key_opens_what_its_scopes_say(file: Path) -> None:
    token, door = new_key(file, "phone", ["route", "chat"]), Doorkeeper(str(file), 0)
    assert door.admit(f"Bearer {token}", "chat") == door.admit(f"Bearer {token}", "") == "phone"
    found = refusal(door, token, "embeddings")
    assert found.status == 403 and "route, chat" in found.message


def test_a_key_that_has_ended_is_refused(file: Path) -> None:
    token = new_key(file, "phone", days=1)
    rows = json.loads(file.read_text())
    rows[0]["expires"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    file.write_text(json.dumps(rows))
    assert "ended" in refusal(Doorkeeper(str(file), 0), token).message


@pytest.mark.parametrize(("seconds", "ended"), [(-60, True), (60, False)])
def test_an_end_without_a_zone_is_in_utc(file: Path, seconds: int, ended: bool) -> None:
    token = new_key(file, "phone")
    end = (datetime.now(UTC) + timedelta(seconds=seconds)).replace(tzinfo=None)
    file.write_text(json.dumps([json.loads(file.read_text())[0] | {"expires": end.isoformat()}]))
    door = Doorkeeper(str(file), 0)
    if ended:
        assert "ended" in refusal(door, token).message
    else:
        assert door.admit(f"Bearer {token}", "chat") == "phone"


@pytest.mark.parametrize("limits", [{"days": 0}, {"days": -1}, {"days": 10**8}, {"per_minute": -5}])
def test_a_key_that_could_never_be_used_is_not_made(file: Path, limits: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a key cannot"):
        new_key(file, "phone", **limits)
    assert not file.exists()


def test_a_key_that_is_taken_out_is_refused_from_then_on(file: Path) -> None:
    token = new_key(file, "phone")
    door = Doorkeeper(str(file), 0)
    door.admit(f"Bearer {token}", "chat")
    kept, at = file.read_text(), file.stat().st_mtime_ns
    file.write_text("[]")
    assert refusal(door, token).status == 401
    file.unlink()
    assert refusal(door, token).status == 401
    file.write_text(kept)
    os.utime(file, ns=(at, at))
    assert door.admit(f"Bearer {token}", "chat") == "phone"


def test_a_key_may_ask_so_often_and_is_told_when_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("serve.access.time.monotonic", lambda: now)
    token = new_key(file, "phone", per_minute=2)
    other = new_key(file, "tablet")
    door = Doorkeeper(str(file), 0)
    door.admit(f"Bearer {token}", "chat")
    door.admit(f"Bearer {token}", "chat")
    found = refusal(door, token)
    assert found.status == 429 and found.retry_after == pytest.approx(30)
    door.admit(f"Bearer {other}", "chat")
    now = 131.0
    door.admit(f"Bearer {token}", "chat")


def test_a_bucket_never_holds_more_than_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("serve.access.time.monotonic", lambda: now)
    bucket = Bucket(3)
    now = 1e6
    assert [bucket.take() == 0 for _ in range(4)] == [True, True, True, False]


def test_bad_names_scopes_and_files_are_refused(file: Path) -> None:
    new_key(file, "phone")
    with pytest.raises(InputError, match="a key 'phone' already"):
        new_key(file, "phone")
    with pytest.raises(InputError, match="did you mean 'embeddings'"):
        new_key(file, "two", ["embedding"])
    for text in ("{", "[1]", '[{"no": "key"}]'):
        file.write_text(text)
        with pytest.raises(InputError, match="not a file of keys"):
            read(file)


def test_the_gateway_asks_for_keys_but_for_what_is_open(settings: Any, replicas: Any, file: Path) -> None:
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    token = new_key(file, "phone", ["route"])
    settings.access.keys = str(file)
    with TestClient(create_app(settings, replicas.__getitem__)) as client:
        assert client.get("/healthz").status_code == client.get("/openapi.json").status_code == 200
        refused = client.post("/v1/route", json={"input": "a"})
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.headers["x-request-id"]
        client.headers["authorization"] = f"Bearer {token}"
        assert client.post("/v1/route", json={"input": "a"}).status_code == 200
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/embeddings", json={"model": "embeddings", "input": "a"}).status_code == 403
        assert client.get("/console/live").status_code == 403


@pytest.mark.parametrize("broken", ["[{", '[{"name": "a"}]', '[{"name": "a", "sha256": "b", "expires": "soon"}]'])
def test_a_file_of_keys_that_is_broken_while_it_is_edited_leaves_those_of_before(
    file: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    token = new_key(file, "phone")
    door = Doorkeeper(str(file), 0)
    file.write_text(broken)
    os.utime(file, ns=(1, 1))
    assert [door.admit(f"Bearer {token}", "chat") for _ in range(3)] == ["phone"] * 3
    assert caplog.text.count("not a file of keys") == 1
    with pytest.raises(InputError, match="not a file of keys"):
        Doorkeeper(str(file), 0)


def test_a_file_of_keys_that_is_not_there_is_refused_at_the_start(file: Path) -> None:
    with pytest.raises(InputError, match=r"keys.json: there is no such file.*access\.keys"):
        Doorkeeper(str(file), 0)


def test_a_file_of_keys_that_vanishes_is_told_once_and_opens_nothing(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = new_key(file, "phone")
    door = Doorkeeper(str(file), 0)
    file.unlink()
    assert [refusal(door, token).status for _ in range(3)] == [401] * 3
    assert caplog.text.count("all keys are refused") == 1
    file.write_text("[{")  # it comes back, and is broken
    assert [refusal(door, token).status for _ in range(3)] == [401] * 3


def test_keys_are_listed_without_what_opens_and_revoked_by_name(file: Path) -> None:
    tokens = {name: new_key(file, name, scopes, days) for name, scopes, days in (("a", ["chat"], None), ("b", [], 3))}
    door = Doorkeeper(str(file), 0)
    listed = table(read(file))
    assert [line.split()[:2] for line in listed.splitlines()] == [["name", "scopes"], ["a", "chat"], ["b", "all"]]
    assert not any(key.sha256 in listed for key in read(file)) and not any(token in listed for token in tokens.values())
    revoke(file, "a")
    assert refusal(door, tokens["a"]).status == 401 and door.admit(f"Bearer {tokens['b']}", "chat") == "b"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(InputError, match="no key 'a'"):
        revoke(file, "a")
    with pytest.raises(InputError, match="cannot be read"):
        revoke(file.with_name("absent.json"), "a")


def test_feedback_on_any_request_is_never_meant_by_silence(file: Path) -> None:
    new_key(file, "all")
    new_key(file, "some", ["feedback"])
    token = new_key(file, "any", [ANY_FEEDBACK])
    door = Doorkeeper(str(file), 0)
    assert [door.allows(name, ANY_FEEDBACK) for name in ("all", "some", "any", "absent")] == [False, False, True, False]
    assert door.admit(f"Bearer {token}", "feedback") == "any"


def test_feedback_needs_the_key_that_asked(settings: Any, replicas: Any, file: Path) -> None:
    from starlette.testclient import TestClient

    from serve.gateway import create_app

    asks, other = new_key(file, "asks"), new_key(file, "other")
    rater = new_key(file, "rater", [ANY_FEEDBACK])
    settings.access.keys = str(file)
    with TestClient(create_app(settings, replicas.__getitem__)) as client:

        def post(path: str, key: str, body: Any) -> Any:
            return client.post(path, json=body, headers={"authorization": f"Bearer {key}"})

        id = post("/v1/route", asks, {"input": "a"}).headers["x-request-id"]
        found = [post("/v1/feedback", key, {"request_id": id, "reward": 1}).status_code for key in (other, asks, rater)]
    assert found == [403, 200, 200]
