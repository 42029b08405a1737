from __future__ import annotations

from srl_rlvr import seeds


def test_a_derived_seed_is_the_same_on_every_machine() -> None:
    assert seeds.derived_seed(0, "srl", 3, 1) == 446976895555938164
    assert 0 <= seeds.derived_seed("anything") < 2**63
