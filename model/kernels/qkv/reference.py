"""The definition of the lightning layer's activation, head by head."""

from __future__ import annotations

import torch
from torch import Tensor


def silu_qkv_reference(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [T, H, D] of x [T, 3 H D], whose heads are [q | k | v] one behind the other."""
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for head in x.split(x.shape[1] // heads, dim=1):
        for own, part in zip(parts, head.chunk(3, dim=1), strict=True):
            own.append(part * torch.sigmoid(part))
    q, k, v = (torch.stack(own, dim=1) for own in parts)
    return q, k, v
