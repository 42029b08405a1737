from __future__ import annotations

import pytest

from srl_rlvr.engines import start_advice


@pytest.mark.parametrize(
    ("cause", "key"),
    [
        ("Available memory on node 0 (0.4/23.54 GiB) on kv cache allocation is less than requested memory for kv "
         "(1.0 GiB). Decrease --kv-cache-memory-bytes, or free memory.", "lower kv_cache_gib"),
        ("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", "kv_cache_gib"),
        ("To serve at least one request with the models's max seq len (4096), (2.0 GiB KV cache is needed, which is "
         "larger than the available KV cache memory (0.1 GiB). Try increasing `gpu_memory_utilization`",
         "raise kv_cache_gib, or lower max_context"),
        ("User-specified max_model_len (99) is greater than the derived max_model_len (max_position_embeddings=9). To "
         "allow overriding this maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1", "lower max_context"),
    ],
)  # fmt: skip
def test_vllms_causes_are_told_with_our_keys_and_without_its_flags(cause: str, key: str) -> None:
    found = start_advice(cause)
    assert key in found and not any(flag in found for flag in ("--", "VLLM_", "gpu_memory_utilization", "\n"))


def test_a_cause_that_is_not_known_stays_whole() -> None:
    assert start_advice("ValueError: Try\nsomething else") == "ValueError: Try something else"
