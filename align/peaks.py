"""What devices could compute in a second."""

from __future__ import annotations

import math

import torch

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
