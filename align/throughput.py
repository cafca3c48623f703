"""How much the training of a model computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peft import PeftModel
from torch import nn

from model import HybridForCausalLM, HybridModel
from model.config import count_operations


def trained_operations(model: nn.Module) -> Callable[[Sequence[int]], float]:
    """Of a microbatch's lengths: the operations of forward and backward; 0 for another network.

    Frozen weights under adapters get no gradient, which saves a third of their products. What is
    computed again, and adapters themselves, do not count, so that the same training has the same
    number however it runs.
    """
    trunk = next((m for m in model.modules() if isinstance(m, HybridModel)), None)
    if trunk is None:
        return lambda lengths: 0.0
    has_head = any(isinstance(m, HybridForCausalLM) for m in model.modules())
    passes = 2 if isinstance(model, PeftModel) else 3
    config = trunk.config

    def operations(lengths: Sequence[int]) -> float:
        found = count_operations(config, lengths, has_head=has_head)
        return float(passes * found.weights + 3 * found.mixing)

    return operations
