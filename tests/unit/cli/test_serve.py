"""What `srl-rlvr serve` does before Ray starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from srl_rlvr.cli import _parser
from srl_rlvr.errors import InputError


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command, in an empty folder; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        options = _parser().parse_args(["serve", *arguments])
        assert options.run(options) == 0
        return capsys.readouterr().out

    return run


def test_keys_are_made_listed_and_revoked(serve: Any) -> None:
    assert serve("--new-key", "phone", "--scope", "route").startswith("srl-")
    assert "phone" in serve("--keys", "list")
    assert serve("--keys", "revoke", "phone").startswith("phone ")
    assert "phone" not in serve("--keys", "list")


@pytest.mark.parametrize("flag", ["--keys", "--keys-file"])
def test_the_file_of_keys_can_be_named(serve: Any, flag: str, tmp_path: Path) -> None:
    serve("--new-key", "phone", flag, "other.json")
    assert (tmp_path / "other.json").is_file() and not (tmp_path / "keys.json").exists()
    assert "phone" in serve("--keys", "list", "--keys-file", "other.json")


def test_the_file_is_that_of_serve_toml(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text('[access]\nkeys = "its.json"\n')
    serve("serve.toml", "--new-key", "phone")
    assert (tmp_path / "its.json").is_file()
    assert "phone" in serve("serve.toml", "--keys", "list")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--keys", "lst"),
        ("--keys", "keys.json"),
        ("--keys", "list", "phone"),
        ("--keys", "revoke"),
        ("--keys", "revoke", "a", "b"),
        ("--keys", "list", "--new-key", "phone"),
        ("--keys-file", "keys.json"),
    ],
)
def test_what_is_asked_of_keys_wrongly_is_one_line(serve: Any, arguments: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--keys") as found:
        serve(*arguments)
    assert "\n" not in str(found.value) and os.listdir(tmp_path) == []


def test_without_token_authentication_nothing_is_served(
    serve: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr("srl_rlvr.cli.serve._stay", lambda *_: pytest.fail("it started"))
    with pytest.raises(InputError, match="RAY_AUTH_MODE"):
        serve("--model", str(tiny_model))


@pytest.mark.parametrize("address", ["", "127.0.0.1:6379"])
def test_a_ray_of_its_own_listens_on_this_machine_alone(address: str, tiny_model: Path, tmp_path: Path) -> None:
    """In a process of its own: Ray reads the setting when it is imported."""
    look = (
        "import os, sys; from srl_rlvr.cli import serve, _parser\n"
        "def stay(*_):\n"
        "    from ray._private import ray_constants\n"
        "    print('clusters', ray_constants.ENABLE_RAY_CLUSTER); return 0\n"
        "serve._stay = stay\n"
        "options = _parser().parse_args(['serve', '--model', sys.argv[1]]); options.run(options)\n"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    finished = subprocess.run(
        [sys.executable, "-c", look, str(tiny_model)], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=variables | ({"RAY_ADDRESS": address} if address else {}),
    )  # fmt: skip
    assert finished.stdout == f"clusters {bool(address)}\n"
