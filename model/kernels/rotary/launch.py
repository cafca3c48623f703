"""Autograd and launches of rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.rotary import kernel

# as measured on one H200
TILE_ELEMENTS = 2048
WARPS = 4


class _Rotate(torch.autograd.Function):
    """Keeps the angles only.

    Not in place: a checkpoint that kept the projection would turn it a second time.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin, is_inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return (*_turn(dq, dk, *ctx.saved_tensors, is_inverse=True), None, None)


def _turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_inverse: bool
) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    total, heads, size = q.shape
    turning, kv_heads = cos.shape[-1], k.shape[1]
    rows = max(1, TILE_ELEMENTS // triton.next_power_of_2(size))
    programs = triton.cdiv(total * heads, rows) + triton.cdiv(total * kv_heads, rows)
    kernel.rotary_fwd_pair[(programs,)](
        q, k, q_out, k_out, cos, sin,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0), total,
        H=heads, G=kv_heads, D=size, R=turning,
        BH=triton.next_power_of_2(turning // 2), BP=triton.next_power_of_2(max(size - turning, 1)),
        BR=rows, INVERSE=is_inverse, num_warps=WARPS,
    )  # fmt: skip
    return q_out, k_out


def rotate_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Same numbers as the torch form of `op.rotate`, the angles not rounded; checked there."""
    return _Rotate.apply(q, k, cos.float().contiguous(), sin.float().contiguous())
