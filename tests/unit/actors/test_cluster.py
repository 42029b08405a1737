from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import cluster
from srl_rlvr.errors import InputError


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token, no cluster and no folder of this machine's user."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


def test_a_token_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        cluster.secure_token()
    finally:
        os.umask(before)
    token = tmp_path / ".ray" / "auth_token"
    made = token.read_text()
    assert len(made) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    cluster.secure_token()
    assert token.read_text() == made and os.listdir(token.parent) == ["auth_token"]


@pytest.mark.parametrize("given", [True, False])
def test_a_token_that_others_can_read_is_shut(given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "elsewhere" if given else tmp_path / ".ray" / "auth_token"
    token.parent.mkdir(exist_ok=True)
    token.write_text("secret")
    token.chmod(0o644)
    if given:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    cluster.secure_token()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and token.read_text() == "secret"


@pytest.mark.parametrize("mode", ["disabled", "DISABLED", "", "off"])
def test_without_token_authentication_nothing_is_served(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.check_authentication()
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(InputError, match="RAY_AUTH_MODE"):
        cluster.check_authentication()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /a/b"), "TMPDIR"),
        (FileNotFoundError(2, "No such file or directory", "/proc/self/ray"), "TMPDIR"),
        (PermissionError(13, "Permission denied", "/other/ray"), "TMPDIR"),
        (Exception("The current node timed out during startup. This could happen"), "30 s"),
        (ValueError("Attempting to cap object store memory usage at 1 bytes\nand more"), "object store"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_what_keeps_ray_from_starting_is_one_line(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InputError, match=said) as found:
        cluster.connect("", 1, dashboard=False)
    assert "\n" not in str(found.value)


def test_the_variable_that_names_the_folder_is_the_one_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise OSError("AF_UNIX path length cannot exceed 107 bytes: /a/b")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("TMPDIR", "/long/one")
    with pytest.raises(InputError, match="/long/one.*set TMPDIR"):
        cluster.connect("", 1, dashboard=False)
    monkeypatch.setenv("RAY_TMPDIR", "/longer/one")
    with pytest.raises(InputError, match="/longer/one.*set RAY_TMPDIR"):
        cluster.connect("", 1, dashboard=False)


def test_names_are_ascii_readable_distinct_and_not_too_long() -> None:
    assert cluster.ascii_name("router-2.b_c~") == "router-2.b_c~"
    assert cluster.ascii_name("Übersetzer / 1") == "%C3%9Cbersetzer%20%2F%201"
    assert cluster.ascii_name("läuf: 1", keep=": ") == "l%C3%A4uf: 1"
    names = ["名前" * 100 + end for end in "ab"] + ["\ud800", "a#b", "a\nb", "a%23b", "%", "😀"]
    found = [cluster.ascii_name(name) for name in names]
    assert len(set(found)) == len(names) and all(len(name) <= 120 and name.isascii() for name in found)
    assert not any(set(name) & set("#/ \n") for name in found)
