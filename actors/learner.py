"""Updates the policy: a Ray Train worker group that lives as long as the run.

`Learner` is a journal of commands; every training worker reads it in order and executes each entry, so all ranks do
the same. A worker group that died starts anew from the last checkpoint and replays the entries after it: same
batches, same order, same weights, nothing lost.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from srl_rlvr.errors import InputError, RunError

# A worker asks again after this long without news, so that one which died while waiting leaves nothing behind.
_LONG_POLL_S = 20.0


@dataclass(frozen=True)
class LearnerSpec:
    model: str
    policy_kind: str  # text | ranking
    policy: dict[str, Any]  # its arguments
    workers: int
    threads: int
    cpus: float
    gpus: float
    max_restarts: int
    storage: str
    runtime_env: dict[str, Any]


@dataclass
class _Entry:
    command: str
    arguments: dict[str, Any]
    done_by: set[int] = field(default_factory=set)
    result: Any = None
    error: str | None = None


@ray.remote(num_cpus=0)
class Learner:
    def __init__(self, spec: LearnerSpec):
        self.spec = spec
        self.entries: list[_Entry] = []
        self.first = 0  # position of entries[0]: what lies before is in the checkpoint
        self.checkpoint: str | None = None
        self.version: int | None = None  # of its weights, where they were loaded as another than the folder's
        self.failure: str | None = None
        self.starts = 0
        self.changed = asyncio.Condition()
        self.loop = asyncio.get_event_loop()
        threading.Thread(target=self._train, args=(ray.get_runtime_context().current_actor,), daemon=True).start()

    async def call(self, command: str, arguments: dict[str, Any]) -> Any:
        """Execute `command` on every worker and return rank 0's result. Raises RunError where it failed."""
        entry = _Entry(command, arguments)
        async with self.changed:
            self.entries.append(entry)
            self.changed.notify_all()
            await self.changed.wait_for(lambda: len(entry.done_by) == self.spec.workers or self.failure is not None)
            if self.failure is not None:
                raise RunError(f"the learner's worker group ended: {self.failure}")
            if command == "load" and entry.error is None:
                self._forget_up_to(entry, arguments["folder"], arguments["version"])
        if entry.error is not None:
            raise RunError(f"learner, {command}: {entry.error}")
        # The journal is kept for replay: held in it, every export's buffer would stay in the object store.
        result, entry.result = entry.result, None
        return result

    async def commit(self, folder: str) -> None:
        """The last save is a whole checkpoint now, and `folder` is where it stands: a restart begins there."""
        async with self.changed:
            saves = [entry for entry in self.entries if entry.command == "save" and entry.error is None]
            if saves:
                self._forget_up_to(saves[-1], folder)

    async def join(self, rank: int) -> tuple[str | None, int | None, int]:
        """Where a worker that starts has to begin: checkpoint folder, the version of its weights where that is not the
        folder's, and position in the journal."""
        self.starts += rank == 0
        return self.checkpoint, self.version, self.first

    async def next(self, position: int) -> tuple[str, dict[str, Any], bool] | None:
        """The entry at `position` and whether it was answered before, or None where there is none yet."""

        def there() -> bool:
            return position - self.first < len(self.entries)

        async with self.changed:
            try:
                await asyncio.wait_for(self.changed.wait_for(there), _LONG_POLL_S)
            except TimeoutError:
                return None
            entry = self.entries[position - self.first]
            return entry.command, entry.arguments, len(entry.done_by) == self.spec.workers

    async def done(self, position: int, rank: int, result: Any, error: str | None) -> None:
        async with self.changed:
            if position < self.first:  # a save was acknowledged and forgotten already
                return
            entry = self.entries[position - self.first]
            entry.done_by.add(rank)
            entry.error = entry.error or error
            if rank == 0:
                entry.result = result
            self.changed.notify_all()

    async def health(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "worker_group_starts": self.starts, "journal": len(self.entries)}

    def _forget_up_to(self, entry: _Entry, folder: str, version: int | None = None) -> None:
        index = self.entries.index(entry)
        self.entries = self.entries[index + 1 :]
        self.first += index + 1
        self.checkpoint, self.version = folder, version

    def _train(self, me: Any) -> None:
        """Run the trainer to its end in a thread; what ends it early becomes `failure`."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        gpus = self.spec.gpus > 0
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"learner": me, "spec": self.spec},
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=self.spec.workers,
                use_gpu=gpus,
                resources_per_worker={"CPU": self.spec.cpus} | ({"GPU": self.spec.gpus} if gpus else {}),
            ),
            run_config=RunConfig(
                storage_path=self.spec.storage,
                failure_config=FailureConfig(max_failures=self.spec.max_restarts),
                worker_runtime_env=self.spec.runtime_env,
            ),
        )
        try:
            trainer.fit()
            ended = "it was stopped"
        except Exception as error:  # this thread's end is the run's: whatever it was, the driver has to be told
            ended = (str(error).strip() or type(error).__name__).splitlines()[-1]
        asyncio.run_coroutine_threadsafe(self._end(ended), self.loop)

    async def _end(self, reason: str) -> None:
        async with self.changed:
            self.failure = reason
            self.changed.notify_all()


def _worker(config: dict[str, Any]) -> None:
    """One training process: builds the policy, catches up with the journal, and goes on until told to stop."""
    learner, spec = config["learner"], config["spec"]
    import torch
    import torch.distributed as dist

    torch.set_num_threads(spec.threads)
    from srl_rlvr.policies import base_models
    from srl_rlvr.policies.ranking import RankingPolicy
    from srl_rlvr.policies.text import TextPolicy

    rank = dist.get_rank()
    make: Any = RankingPolicy if spec.policy_kind == "ranking" else TextPolicy
    model = base_models.on_this_node(spec.model)
    policy = make(model, device="cuda" if spec.gpus else "cpu", **spec.policy)
    checkpoint, version, position = ray.get(learner.join.remote(rank))
    if checkpoint is not None:
        _load(policy, learner, checkpoint, version)
    while True:
        entry = ray.get(learner.next.remote(position))
        if entry is None:
            continue
        command, arguments, replayed = entry
        result, error = None, None
        try:
            if not (replayed and command in _READ_ONLY):
                result = _COMMANDS[command](policy, learner, **arguments)
        except (InputError, RunError, ValueError, OSError) as caught:
            error = str(caught)
        ray.get(learner.done.remote(position, rank, result, error))
        position += 1
        if command == "stop":
            return


def _update(policy: Any, learner: Any, samples: list[Any], spec: Any) -> dict[str, float]:
    return policy.update(ray.get(samples[0]), spec)


def _export(policy: Any, learner: Any) -> tuple[list[Any], Any]:
    """The weights, put into the object store once, from where they lie: generators read that very buffer. On a GPU
    they stay there where NIXL is installed, and generators fetch them by Ray Direct Transport (never run here)."""
    flat, manifest = policy.export()
    if policy.rank:
        return [], manifest
    if flat.is_cuda and importlib.util.find_spec("nixl") is not None:
        return [ray.put(flat, _tensor_transport="nixl")], manifest
    from srl_rlvr.policies import weights

    array, manifest = weights.in_memory(flat, manifest)
    return [ray.put(array)], manifest


def _save(policy: Any, learner: Any, folder: str) -> None:
    policy.save(Path(folder))


def _load(policy: Any, learner: Any, folder: str, version: int | None) -> None:
    policy.load(Path(folder))
    policy.version = policy.version if version is None else version


def _save_model(policy: Any, learner: Any, folder: str, card: dict[str, Any]) -> None:
    policy.save_model(Path(folder), card)


def _begin_stage(policy: Any, learner: Any, keep_reference: bool) -> None:
    policy.begin_stage(keep_reference)


def _notices(policy: Any, learner: Any) -> list[str]:
    return policy.notices


def _stop(policy: Any, learner: Any) -> None:
    return None


_READ_ONLY = ("export", "save_model", "notices")
_COMMANDS: dict[str, Callable[..., Any]] = {
    "update": _update,
    "export": _export,
    "save": _save,
    "load": _load,
    "save_model": _save_model,
    "begin_stage": _begin_stage,
    "notices": _notices,
    "stop": _stop,
}
