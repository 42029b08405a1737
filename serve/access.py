"""Who may ask, and how often: API keys, hashed at rest, with scopes and an end; a bucket of requests for each.

A key is 32 random bytes, so that its plain SHA-256 tells nothing; it is shown once, when it is made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from serve.errors import Refusal
from srl_rlvr.errors import InputError
from srl_rlvr.examples.names import nearest

log = logging.getLogger(__name__)

ANY_FEEDBACK = "feedback:any"  # on requests of other keys, too; never without being named
SCOPES = (
    "chat", "completions", "embeddings", "rerank", "route", "parse", "extract", "vision", "feedback", ANY_FEEDBACK,
    "console",
)  # fmt: skip
_PREFIX = "srl-"
_LONGEST_DAYS = 36_500


@dataclass(frozen=True)
class Key:
    name: str
    sha256: str
    scopes: tuple[str, ...] = ()  # all where there are none
    expires: str = ""  # ISO 8601; UTC where it names no zone
    requests_per_minute: int = 0  # 0: as the config says

    def ended(self) -> bool:
        if not self.expires:
            return False
        end = datetime.fromisoformat(self.expires)
        return (end if end.tzinfo else end.replace(tzinfo=UTC)) <= datetime.now(UTC)


@dataclass
class Bucket:
    """So many requests a minute, as many at once."""

    per_minute: int
    left: float = field(init=False)
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.left, self.at = float(self.per_minute), time.monotonic()

    def take(self) -> float:
        """0.0, or in how many seconds there is room."""
        now = time.monotonic()
        self.left = min(self.per_minute, self.left + (now - self.at) * self.per_minute / 60)
        self.at = now
        if self.left < 1:
            return (1 - self.left) * 60 / self.per_minute
        self.left -= 1
        return 0.0

    def charge(self, more: int) -> None:
        """For a request that counts as several: what it takes beyond one is paid before the next."""
        self.left -= more


class Doorkeeper:
    """Reads the file of keys anew when it changes: a key that is taken out is refused from then on."""

    def __init__(self, file: str, requests_per_minute: int):
        self.file = Path(file) if file else None
        self.per_minute = requests_per_minute
        self.keys: dict[str, Key] = {}
        self.buckets: dict[str, Bucket] = {}
        self._seen: tuple[int, int, int] | None = None  # the file, when it was read last
        self._began = False
        if self.file is not None:
            if not self.file.is_file():
                raise InputError(f"{self.file}: there is no such file of keys; make one with 'srl-rlvr serve --new-key "
                                 "NAME', or correct access.keys")  # fmt: skip
            self._read(self.file)

    def allows(self, name: str, scope: str) -> bool:
        """Whether the key of this name has the scope by its own words. Without a file of keys: all have every one."""
        return self.file is None or any(key.name == name and scope in key.scopes for key in self.keys.values())

    def admit(self, authorization: str, scope: str) -> str:
        """The name of the key. Raises Refusal: 401, 403 or 429."""
        if self.file is None:
            name, per_minute = "", self.per_minute
        else:
            self._read(self.file)
            scheme, _, token = authorization.partition(" ")
            key = self.keys.get(_digest(token.strip())) if scheme.lower() == "bearer" else None
            if key is None:
                raise Refusal(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")
            if key.ended():
                raise Refusal(401, f"the API key '{key.name}' ended on {key.expires[:10]}", "invalid_api_key")
            if scope and key.scopes and not {scope, f"{scope}:any"} & set(key.scopes):
                raise Refusal(403, f"the API key '{key.name}' may ask for {', '.join(key.scopes)}, not for {scope}")
            name, per_minute = key.name, key.requests_per_minute or self.per_minute
        if per_minute:
            bucket = self.buckets.get(name)
            if bucket is None or bucket.per_minute != per_minute:
                bucket = self.buckets[name] = Bucket(per_minute)
            wait = bucket.take()
            if wait:
                raise Refusal(429, f"more than {per_minute} requests in a minute; come back in {wait:.0f} s",
                              "rate_limit_exceeded", retry_after=wait)  # fmt: skip
        return name

    def charge(self, name: str, more: int) -> None:
        """Count `more` requests of this key, beyond the one that let it in."""
        if name in self.buckets:
            self.buckets[name].charge(more)

    def _read(self, file: Path) -> None:
        try:
            found = file.stat()
        except OSError as error:
            if self._seen is not None:
                log.warning("%s: cannot be read (%s); until it is back all keys are refused", file, error.strerror)
            self.keys, self._seen = {}, None
            return
        changed = (found.st_mtime_ns, found.st_ino, found.st_size)
        if changed != self._seen:
            self._seen = changed
            try:
                self.keys = {key.sha256: key for key in read(file)}
            except InputError as error:
                if not self._began:
                    raise
                log.warning("%s; %s", error, "the keys that it had hold on" if self.keys else "all keys are refused")
        self._began = True


def read(file: Path) -> list[Key]:
    """Raises InputError where the file is not one of keys."""
    try:
        keys = [Key(**{**row, "scopes": tuple(row.get("scopes", ()))}) for row in json.loads(file.read_text())]
        for key in keys:
            key.ended()  # which reads when it does
        return keys
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{file}: not a file of keys; make one with 'srl-rlvr serve --new-key NAME'") from None


def new_key(file: Path, name: str, scopes: Sequence[str] = (), days: int | None = None, per_minute: int = 0) -> str:
    """Makes a key, keeps its hash in the file and returns it: it is not to be had again. Raises InputError."""
    unknown = next((scope for scope in scopes if scope not in SCOPES), None)
    if unknown is not None:
        raise InputError(f"there is no scope '{unknown}'{nearest(unknown, SCOPES)}; there are {', '.join(SCOPES)}")
    if days is not None and not 1 <= days <= _LONGEST_DAYS:
        raise InputError(f"a key cannot be valid for {days} days: 1 to {_LONGEST_DAYS} can be asked for")
    if per_minute < 0:
        raise InputError(f"a key cannot have {per_minute} requests a minute: 1 or more, or 0 for as the config says")
    keys = read(file) if file.is_file() else []
    if any(key.name == name for key in keys):
        raise InputError(f"{file}: there is a key '{name}' already; take its row out first, or choose another name")
    token = _PREFIX + secrets.token_urlsafe(32)
    expires = (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="seconds") if days is not None else ""
    keys.append(Key(name, _digest(token), tuple(scopes), expires, per_minute))
    _write(file, keys)
    return token


def revoke(file: Path, name: str) -> None:
    """Take a key out of the file: gateways refuse it from then on. Raises InputError."""
    keys = read(file)
    if not any(key.name == name for key in keys):
        raise InputError(f"{file}: there is no key '{name}'{nearest(name, [key.name for key in keys])}")
    _write(file, [key for key in keys if key.name != name])


def table(keys: Sequence[Key]) -> str:
    """The keys as lines: name, scopes, end, requests a minute. Never the keys themselves, which nobody has."""
    rows = [("name", "scopes", "expires", "per minute")]
    for key in keys:
        end = f"{key.expires}{' (ended)' if key.ended() else ''}" if key.expires else "never"
        rows.append(
            (key.name, ", ".join(key.scopes) or "all", end, str(key.requests_per_minute or "as the config says"))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _write(file: Path, keys: Sequence[Key]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            json.dump([vars(key) for key in keys], out, indent=2)
        os.replace(partial, file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
