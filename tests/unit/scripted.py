"""A crew that answers as a script says: nothing that is tested with it says anything about learning."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from srl_rlvr import records
from srl_rlvr.engines import SamplingSpec
from srl_rlvr.policies.losses import UpdateSpec

# (outcome, reward) of one sample, from its prompt id, its index and the batch's seed
Script = Callable[[str, int, int], tuple[str, float]]


def mixed(prompt_id: str, index: int, seed: int) -> tuple[str, float]:
    """Some groups constant, some not, some verifications failed; decided by nothing but the arguments."""
    rng = random.Random(f"{prompt_id}/{seed}")
    if rng.random() < 0.4:
        return records.SCORED, 0.0
    rng = random.Random(f"{prompt_id}/{index}/{seed}")
    return rng.choice([(records.SCORED, 1.0), (records.SCORED, 0.25), (records.INVALID, -1.0), (records.FAILED, 0.0)])


def varied(prompt_id: str, index: int, seed: int) -> tuple[str, float]:
    return records.SCORED, float(index % 2)


class ScriptedCrew:
    """Answers as the script says, and keeps a log of what it was asked."""

    def __init__(self, script: Script):
        self.script = script
        self.log: list[Any] = []
        self.received: list[list[str]] = []
        self.learned = self.served = 0  # versions
        self.holds = 0  # the update whose weights the learner holds

    def sample(self, prompts: pa.Table, spec: SamplingSpec) -> tuple[pa.Table, pa.Table, dict[str, float]]:
        return self.receive(self.send(prompts, spec))

    def send(self, prompts: pa.Table, spec: SamplingSpec) -> Any:
        """Sampled at once, by the weights that are served when it is sent: no real rollout is older."""
        self.log.append(("sample", prompts["stage"][0].as_py(), prompts["id"].to_pylist(), spec))
        rollouts, verdicts = [], []
        for prompt_id in prompts["id"].to_pylist():
            for index in range(spec.samples):
                outcome, reward = self.script(prompt_id, index, spec.seed)
                rollouts.append(
                    {
                        "prompt_id": prompt_id, "sample_index": index, "policy_version": self.served,
                        "token_ids": [5 + index, 0], "logprobs": [-1.0, -2.0], "text": "x", "finish_reason": "stop",
                    }
                )  # fmt: skip
                verdicts.append(
                    {
                        "prompt_id": prompt_id, "sample_index": index, "outcome": outcome, "reward": reward,
                        "components": "{}", "detail": "",
                    }
                )  # fmt: skip
        seconds = {"sample_s": 1.0, "verify_s": 0.5}
        return prompts, (records.build("Rollout", rollouts), records.build("Verdict", verdicts), seconds)

    def receive(self, ticket: Any) -> tuple[pa.Table, pa.Table, dict[str, float]]:
        prompts, answers = ticket
        if prompts["stage"][0].as_py() != "evaluation":
            self.received.append(prompts["id"].to_pylist())
        return answers

    def update(self, samples: pa.Table, spec: UpdateSpec) -> dict[str, float]:
        records.check("Sample", samples)
        self.log.append(("update", samples.to_pylist(), spec))
        self.learned += 1
        self.holds = self.learned
        return {"loss": 0.5, "grad_norm": 1.0} | ({"preferred": 1.0} if spec.loss == "preference" else {})

    def begin_stage(self, keep_reference: bool) -> None:
        self.log.append(("begin_stage", keep_reference))

    def hand_over(self) -> None:
        self.served = self.learned

    def save(self, folder: Path) -> None:
        (folder / "learner.pt").write_text(json.dumps(self.holds))

    def commit(self, folder: Path) -> None:
        assert (folder / "learner.pt").is_file() and not folder.name.startswith(".")

    def load(self, folder: Path, version: int | None = None) -> None:
        self.holds = json.loads((folder / "learner.pt").read_text())
        self.learned = self.holds if version is None else version

    def save_model(self, folder: Path, card: dict[str, Any]) -> None:
        (folder / "model.safetensors").write_text(json.dumps(self.holds))


class Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[dict[str, Any]] = []

    def stage(self, label: str, kind: str, steps: int) -> None: ...

    def phase(self, text: str) -> None: ...

    def step(self, metrics: dict[str, Any]) -> None:
        self.steps.append(metrics)

    def note(self, text: str) -> None:
        self.notes.append(text)


def problems(count: int, first: int = 0) -> pa.Table:
    rows = [
        records.example(
            model_type="task_llm", task="sums", prompt=f"{n} + 1 + 1", steps=[f"{n} + 1 = {n + 1}"] * (1 + n % 3),
            reference=str(n + 2), verifier="number", difficulty=1 + n % 3,
        )
        for n in range(first, first + count)
    ]  # fmt: skip
    return records.build("Example", rows)
