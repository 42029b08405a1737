"""What one process of a worker group does in `test_workers`; alone it is the answer that the group is held to."""

from __future__ import annotations

import dataclasses
import faulthandler
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCHES = ["SRL trees of many steps", "one sample", "RLVR groups of uneven lengths"]


def worker(work: Callable[..., None]) -> Callable[..., None]:
    """`work(rank, world, …, out)` in a process of its group, which ends as Ray Train's workers do: at once.

    Python's own end is not for it: FSDP's caches hold the group beyond `destroy_process_group`, so gloo's threads would
    run on beside an interpreter that is being taken down.
    """

    @functools.wraps(work)
    def run(rank: int, world: int, *arguments: Any) -> None:
        import torch
        import torch.distributed as dist

        sys.path.insert(0, str(Path(__file__).parent))
        torch.set_num_threads(1)
        if world == 1:
            work(rank, world, *arguments)
            return
        faulthandler.enable()
        rendezvous = f"file://{arguments[-1]}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
        work(rank, world, *arguments)
        dist.barrier()  # the other may still read from this one
        os._exit(0)

    return run


@worker
def run(rank: int, world: int, strategy: str, lora_rank: int, model: str, out: str) -> None:
    """Updates, a save, a load into a new policy, one more update; rank 0 leaves what came of it in `out`."""
    import cases
    import torch
    import torch.distributed as dist

    from srl_rlvr.policies.losses import UpdateSpec
    from srl_rlvr.policies.text import TextPolicy, _whole

    folder = Path(out)

    def make(seed: int) -> TextPolicy:
        return TextPolicy(
            Path(model),
            lora_rank=lora_rank,
            lora_alpha=16.0,
            tokens_per_microbatch=30,
            weight_decay=0.01,
            strategy=strategy,
            activation_checkpointing=world > 1,  # layers run twice below the strategy's hooks, and nothing may change
            seed=seed,
        )

    def gradients(policy: TextPolicy) -> dict[str, Any]:
        return {name: _whole(p.grad) for name, p in policy.network.named_parameters() if p.requires_grad}

    policy = make(0)
    policy.begin_stage(keep_reference=True)
    spec = UpdateSpec(loss="policy_gradient", learning_rate=1e-4, temperature=0.9, kl=0.2)
    found: dict[str, Any] = {"metrics": [], "gradients": []}
    for name in BATCHES:
        found["metrics"].append(policy.update(cases.table(cases.BATCHES[name]), spec))
        found["gradients"].append(gradients(policy))
    found["metrics"].append(policy.update(cases.table(cases.BATCHES[BATCHES[0]]), dataclasses.replace(spec, updates=2)))
    policy.save(folder)
    if world > 1:
        dist.barrier()
    resumed = make(1)
    resumed.load(folder)
    for each in (policy, resumed):
        each.update(cases.table(cases.BATCHES[BATCHES[0]]), spec)
    buffer, manifest = resumed.export()
    found["logprobs"] = resumed.logprobs(cases.table(cases.BATCHES[BATCHES[0]]))
    found["resumed_is_uninterrupted"] = policy.export()[1].checksum == manifest.checksum
    found["weights"] = buffer.clone()
    resumed.save_model(folder / "model", {})
    try:
        bad = [sample | {"advantage": float("nan")} for sample in cases.BATCHES[BATCHES[0]]]
        resumed.update(cases.table(bad), spec)
    except ValueError as error:
        found["refused"] = str(error)
    if rank == 0:
        torch.save(found, folder / "found.pt")


@worker
def hand_over(rank: int, world: int, strategies: tuple[str, str], model: str, out: str) -> None:
    """One strategy's policy updates, saves and updates again; the other's loads that and updates, too."""
    import cases
    import torch
    import torch.distributed as dist

    from srl_rlvr.policies.losses import UpdateSpec
    from srl_rlvr.policies.text import TextPolicy

    folder = Path(out)
    first, second = (TextPolicy(Path(model), strategy=strategy) for strategy in strategies)
    samples = cases.table(cases.BATCHES[BATCHES[0]])
    spec = UpdateSpec(loss="policy_gradient", learning_rate=1e-4, kl=0.2)
    first.begin_stage(keep_reference=True)
    first.update(samples, spec)
    first.save(folder)
    dist.barrier()
    second.load(folder)
    for policy, name in ((first, "before"), (second, "after")):
        policy.update(samples, spec)
        buffer, _ = policy.export()
        if rank == 0:
            torch.save(buffer.clone(), folder / f"{name}.pt")


@worker
def see(rank: int, world: int, model: str, out: str) -> None:
    """Updates of a policy that sees, the last of one tree; rank 0 leaves what came of it in `out`."""
    import cases
    import torch

    from srl_rlvr.policies.losses import UpdateSpec
    from srl_rlvr.policies.text import TextPolicy

    folder = Path(out)
    policy = TextPolicy(Path(model), tokens_per_microbatch=30)
    policy.begin_stage(keep_reference=True)
    config = policy.network.config
    samples = cases.seen(config.image_token_id, config.image_seq_length)
    spec = UpdateSpec(loss="policy_gradient", learning_rate=1e-4, kl=0.2)
    batches = [cases.table(batch) for batch in (samples, samples, samples[:2])]
    metrics = [policy.update(batch, spec) for batch in batches]
    found = {"metrics": metrics, "logprobs": policy.logprobs(batches[0])}
    if rank == 0:
        torch.save(found, folder / "found.pt")
