from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def oracle_model(tiny_model: Path) -> Callable[[int], Any]:
    """A function from a LoRA rank (0 = none) to a fresh float64 model, adapters random so that both get gradients."""
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).double().eval()

    def make(lora_rank: int) -> Any:
        network = copy.deepcopy(base)
        if not lora_rank:
            return network
        from peft import LoraConfig, get_peft_model

        adapted: Any = get_peft_model(network, LoraConfig(r=lora_rank, lora_alpha=16, target_modules="all-linear"))
        torch.manual_seed(7)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    # In float32 steps, so that the policy can hold the very same values.
                    parameter.copy_((torch.randn_like(parameter) * 0.1).float())
        return adapted.double()

    return make
