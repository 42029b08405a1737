"""What one update learns from: groups of samples, their rewards, and the advantages that come of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from srl_rlvr import records
from srl_rlvr.config import PolicyGradientStage
from srl_rlvr.errors import RunError
from srl_rlvr.policies.advantages import group_advantages
from srl_rlvr.records import PASSED

_EXPERT_REWARD = 1.0  # of any measure: the similarity of a step to itself


class Batch:
    """Groups drawn for one update: those with signal become samples, all of them are counted.

    `version` is the learner's; a rollout may be `max_staleness` older, which the importance weights correct for.
    `experts`: by prompt id, the tokens of an action that joins its group as one more member; all prompts or none.
    """

    def __init__(
        self,
        stage: PolicyGradientStage,
        version: int,
        max_staleness: int = 0,
        experts: Mapping[str, list[int]] | None = None,
    ):
        self.stage = stage
        self.version = version
        self.max_staleness = max_staleness
        self.experts = experts or {}
        self.with_signal = 0
        self.advantage_of: dict[tuple[str, int], float] = {}
        self._samples: list[pa.Table] = []
        self.rewards: list[np.ndarray] = []
        self._stds: list[float] = []
        self._outcomes = dict.fromkeys(records.OUTCOMES, 0)
        self._tokens = self._staleness = self._rollouts = self._drawn = self._truncated = 0
        self._scored_reward = 0.0  # sum over scored samples
        self._seconds = {"sample_s": 0.0, "verify_s": 0.0}

    def add(self, prompts: pa.Table, rollouts: pa.Table, verdicts: pa.Table, seconds: dict[str, float]) -> int:
        """Count every group and keep the samples of those with signal; returns the tokens that were sampled.

        A failed verdict is no reward: its sample is left out of the group's mean and of the batch. Raises RunError
        where rollouts, verdicts and prompts do not belong together, or a rollout is too old or of a later policy.
        """
        self._check(prompts, rollouts, verdicts)
        tokens = pc.sum(pc.list_value_length(rollouts["token_ids"])).as_py()  # type: ignore[attr-defined]
        self._tokens += tokens
        self._rollouts += rollouts.num_rows
        self._truncated += pc.sum(pc.equal(rollouts["finish_reason"], "length")).as_py()  # type: ignore[attr-defined]
        scored = verdicts.filter(pc.equal(verdicts["outcome"], records.SCORED))  # type: ignore[attr-defined]
        self._scored_reward += float(scored["reward"].to_numpy().sum())
        self._staleness += int((self.version - rollouts["policy_version"].to_numpy()).sum())
        for found in verdicts["outcome"].value_counts().to_pylist():
            self._outcomes[found["values"]] += found["counts"]
        self._add_groups(prompts, rollouts, verdicts)
        self._drawn += prompts.num_rows
        for name, value in seconds.items():
            self._seconds[name] += value
        return tokens

    def _check(self, prompts: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> None:
        size = self.stage.group_size
        n = size * prompts.num_rows
        if not rollouts.num_rows == verdicts.num_rows == n:
            raise RunError(
                f"{prompts.num_rows} prompts × {size}: got {rollouts.num_rows} rollouts and {verdicts.num_rows} "
                "verdicts"
            )
        ids, indices = (
            prompts["id"].take(pa.array(np.repeat(np.arange(n // size), size))),
            np.tile(range(size), n // size),
        )
        for what, table in (("rollout", rollouts), ("verdict", verdicts)):
            found = table["sample_index"].to_numpy()
            right = pc.equal(table["prompt_id"], ids).to_numpy() & (found == indices)  # type: ignore[attr-defined]
            if not right.all():
                row = int(np.argmin(right))
                raise RunError(
                    f"{what} {found[row]} of {table['prompt_id'][row]} stands where {indices[row]} of {ids[row]} should"
                )
        for version in rollouts["policy_version"].unique().to_pylist():
            if not 0 <= self.version - version <= self.max_staleness:
                raise RunError(
                    f"a rollout is of policy version {version}, the learner's is {self.version}, and max_staleness is "
                    f"{self.max_staleness}"
                )

    def _add_groups(self, prompts: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> None:
        size = self.stage.group_size
        shape = (prompts.num_rows, size)
        rewards_P_G = verdicts["reward"].to_numpy().astype(np.float64).reshape(shape)
        judged_P_G = pc.not_equal(verdicts["outcome"], records.FAILED).to_numpy().reshape(shape)  # type: ignore[attr-defined]
        rows: list[np.ndarray] = []
        advantages: list[np.ndarray] = []
        prompt_ids = prompts["id"].to_pylist()
        for g, (rewards, judged) in enumerate(zip(rewards_P_G, judged_P_G, strict=True)):
            rewards = rewards[judged]
            self.rewards.append(rewards)
            deviation = float(rewards.std()) if len(rewards) else 0.0
            self._stds.append(deviation)
            expert = self.experts[prompt_ids[g]] if self.experts else None
            group = rewards if expert is None else np.append(rewards, _EXPERT_REWARD)
            if len(group) >= 2 and float(group.std()) > self.stage.min_reward_std:
                found = group_advantages(group, self.stage.advantage)
                rows.append(g * size + np.flatnonzero(judged))
                advantages.append(found[: len(rewards)])
                if expert is not None:
                    self._samples.append(self._expert_sample(prompts.slice(g, 1), expert, found[-1]))
        self.with_signal += len(rows)
        if rows:
            self._keep(prompts, rollouts, np.concatenate(rows), np.concatenate(advantages))

    def _expert_sample(self, prompt: pa.Table, tokens: list[int], advantage: float) -> pa.Table:
        """Without behaviour log-probabilities: no engine drew it."""
        [asked] = prompt.to_pylist()
        row = {
            "prompt_id": asked["id"],
            "sample_index": self.stage.group_size,
            "trunk_id": asked["trunk_id"],
            "policy_version": self.version,
            "prompt_ids": asked["token_ids"],
            "images": asked["images"],
            "completion_ids": tokens,
            "behavior_logprobs": [float("nan")] * len(tokens),
            "advantage": float(advantage),
        }
        return records.build("Sample", [row])

    def _keep(self, prompts: pa.Table, rollouts: pa.Table, rows: np.ndarray, advantages: np.ndarray) -> None:
        """The rollouts in `rows` and their prompts become samples with these advantages."""
        asked = prompts.take(pa.array(rows // self.stage.group_size))
        answered = rollouts.take(pa.array(rows))
        columns = {
            "prompt_id": asked["id"],
            "sample_index": answered["sample_index"],
            "trunk_id": asked["trunk_id"],
            "policy_version": answered["policy_version"],
            "prompt_ids": asked["token_ids"],
            "images": asked["images"],
            "completion_ids": answered["token_ids"],
            "behavior_logprobs": answered["logprobs"],
            "advantage": pa.array(advantages, pa.float32()),
        }
        self._samples.append(pa.table(columns, schema=records.SAMPLE))
        keys = zip(columns["prompt_id"].to_pylist(), columns["sample_index"].to_pylist(), strict=True)
        self.advantage_of.update(zip(keys, advantages.tolist(), strict=True))

    @property
    def samples(self) -> pa.Table:
        return records.concat("Sample", self._samples)

    @property
    def metrics(self) -> dict[str, Any]:
        judged = np.concatenate(self.rewards)
        rewards = judged if len(judged) else np.zeros(1)
        return {
            "reward": float(rewards.mean()),
            "reward_std": float(np.mean(self._stds)),
            "pass_rate": float((rewards >= PASSED).mean()),
            "groups_drawn": float(self._drawn),
            "groups_with_signal": float(self.with_signal),
            "scored_reward": self._scored_reward / max(1, self._outcomes[records.SCORED]),
            "completion_tokens": self._tokens / self._rollouts,
            "truncated": self._truncated / self._rollouts,
            "tokens_per_s": self._tokens / max(self._seconds["sample_s"], 1e-9),
            "staleness": self._staleness / self._rollouts,
            **{outcome: float(count) for outcome, count in self._outcomes.items()},
            **self._seconds,
        }
