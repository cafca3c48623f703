"""Rotary positions for softmax layers; the report rotates half of each head (`rotary_dim`)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(
    positions: Tensor, rotary_dim: int, base: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles.

    Args:
        positions: [T] int64.
        rotary_dim: dimensions that are rotated, even.
        base: theta; angle i turns by base^(-2i / rotary_dim) a token.
        dtype: of the angles, fp32 or fp64; a bf16 angle would be off by radians beyond a few
            hundred tokens.

    Returns: cos and sin, each [T, 1, rotary_dim] in dtype, the halves repeated (rotate-half form).
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=dtype, device=positions.device)
    frequency = 1.0 / (base ** (exponent / rotary_dim))
    angle = positions.to(dtype)[:, None] * frequency[None, :]
    angle = torch.cat((angle, angle), dim=-1)[:, None, :]
    return angle.cos(), angle.sin()
