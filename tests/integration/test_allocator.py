"""Processes that compute on CPUs run on jemalloc."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from actors import supervisor

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@ray.remote(num_cpus=0)
def mapped_libraries() -> str:
    return Path("/proc/self/maps").read_text()


def test_a_worker_without_a_gpu_runs_on_jemalloc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        mapped = ray.get(mapped_libraries.options(runtime_env=supervisor.cpu_allocator(gpus=0)).remote(), timeout=120)
    finally:
        ray.shutdown()
    assert "libjemalloc.so" in mapped


def test_gpus_and_an_allocator_of_ones_own_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert supervisor.cpu_allocator(gpus=1) == {}
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so")
    assert supervisor.cpu_allocator(gpus=0) == {}
