"""What a run asks of a cluster, before it asks."""

from __future__ import annotations

from typing import Any

import pytest

from actors.supervisor import learner_calls, preflight
from srl_rlvr import config as configs
from srl_rlvr.errors import InputError


def run(**settings: Any) -> configs.RunConfig:
    return configs.parse({"data": [{"family": "sums"}], "stages": [{"kind": "rlvr"}]} | settings, "run")


def test_as_many_runs_as_are_to_go_at_once_have_to_fit() -> None:
    assert preflight(run(), [{"CPU": 2.0}]).endswith("= 2 CPU; supply: 2 CPU")
    with pytest.raises(InputError, match="need 4 CPU, the cluster has 3 CPU"):
        preflight(run(), [{"CPU": 2.0}, {"CPU": 1.0}], runs=2)


def test_what_fits_no_node_is_refused_however_many_there_are() -> None:
    large = run(cluster={"cpus_per_generator": 16.0})
    with pytest.raises(InputError, match="a generator needs 16 CPU, and no node has that; lower cluster.cpus_per_gen"):
        preflight(large, [{"CPU": 8.0}] * 4)


def test_the_driver_reaches_a_learner_whose_workers_all_wait() -> None:
    for workers in (1, 64, 500):
        assert learner_calls(workers) >= 2 * workers + 8
