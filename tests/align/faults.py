"""Ways in which an engine may hold another policy than its trainer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel

from align.lora import LoraConfig, apply_lora
from rollout.sync import adapter_weights
from tests.align import small


def adapted() -> PeftModel:
    """A policy whose adapters matter."""
    # vLLM's attention on a CPU has no heads of 8
    model = apply_lora(small.model(head_dim=32, rotary_dim=16), LoraConfig(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_weights(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def _wrong_weight(policy: PeftModel) -> None:
    policy.get_base_model().lm_head.weight.data[3, 4] += 1.0


def _permuted_experts(policy: PeftModel) -> None:
    held = policy.get_base_model().state_dict().items()
    stack = next(t for name, t in held if t.ndim == 3 and "lora_" not in name)
    stack[[0, 1]] = stack[[1, 0]].clone()


def _missing_adapter(policy: PeftModel) -> None:
    for tensor in adapter_weights(policy).values():
        tensor.zero_()


def _stale_version(policy: PeftModel) -> None:
    """As the policy was an update ago."""
    for tensor in adapter_weights(policy).values():
        tensor.mul_(0.9)


FAULTS: dict[str, Callable[[PeftModel], None]] = {
    "wrong weight": _wrong_weight,
    "permuted experts": _permuted_experts,
    "missing adapter": _missing_adapter,
    "stale version": _stale_version,
}


def spoiled(fault: str) -> PeftModel:
    """What an engine holds that has this fault."""
    policy = adapted()
    with torch.no_grad():
        FAULTS[fault](policy)
    return policy
