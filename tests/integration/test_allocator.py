"""Processes that compute run on the threads they are given, on CPUs with jemalloc."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from actors import cluster

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@ray.remote(num_cpus=0)
def seen_by_a_worker() -> tuple[str, int]:
    import torch

    return Path("/proc/self/maps").read_text(), torch.get_num_threads()


def test_a_worker_without_a_gpu_runs_on_jemalloc_and_on_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        environment = cluster.worker_environment(gpus=0, threads=2)
        mapped, threads = ray.get(seen_by_a_worker.options(runtime_env=environment).remote(), timeout=120)
    finally:
        ray.shutdown()
    assert "libjemalloc.so" in mapped
    assert threads == 2, "Ray's own choice for num_cpus=0 is 1"


def test_gpus_and_an_allocator_of_ones_own_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert "LD_PRELOAD" not in cluster.worker_environment(gpus=1, threads=1)["env_vars"]
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so")
    assert "LD_PRELOAD" not in cluster.worker_environment(gpus=0, threads=1)["env_vars"]
