"""How much a run computes, and which share that is of what its devices could."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from torch import nn

from model import HybridForCausalLM, HybridModel
from model.config import count_operations

# Dense bf16 multiplications and additions a second, as the makers tell; the first that fits.
_PEAKS = (
    ("NVIDIA B200", 2250e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA GH200", 989e12),
    ("NVIDIA A100", 312e12),
)


def peak_operations(device: torch.device) -> float:
    """Operations a second of `device` in bf16; nan where it is not known.

    Example:
        >>> peak_operations(torch.device("cpu"))
        nan
    """
    if device.type != "cuda":
        return math.nan
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float:
    """`peak_operations` of a device by its name.

    Example:
        >>> f"{named_peak('NVIDIA H100 80GB HBM3'):.3g}"
        '9.89e+14'
    """
    return next((peak for start, peak in _PEAKS if name.startswith(start)), math.nan)


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
