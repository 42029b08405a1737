from __future__ import annotations

from actors.telemetry import Telemetry


def test_names_of_any_script_are_taken_for_a_run_and_its_stages() -> None:
    telemetry = Telemetry("läuf 😀 1")
    for stage in ("sft", "Übung / 2", "第一", "a\nb"):
        telemetry.step({"stage": stage, "reward": 0.5, "sample_s": 1.0, "scored": 1, "invalid": 0, "failed": 0})
