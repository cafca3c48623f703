"""Autograd and launches of the lightning layer's activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.qkv import kernel

# as measured on one H200
TILE_ELEMENTS = 2048
WARPS = 4


class _SiluQkv(torch.autograd.Function):
    """Keeps the projection only; one kernel gives its gradient from those of q, k and v."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.heads = heads
        # a pass of torch's own runs at the speed of memory
        q, k, v = F.silu(x).view(x.shape[0], heads, -1).chunk(3, dim=-1)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dq, dk, dv = (g if g.stride(2) == 1 else g.contiguous() for g in grads)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total, heads, size = dq.shape
        padded = triton.next_power_of_2(size)
        rows = max(1, TILE_ELEMENTS // padded)
        kernel.qkv_bwd_silu[(triton.cdiv(total * heads, rows),)](
            dq, dk, dv, x, dx,
            dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1),
            x.stride(0), total * heads,
            H=heads, D=size, BD=padded, BR=rows, num_warps=WARPS,
        )  # fmt: skip
        return dx, None


def silu_qkv_triton(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Same numbers as the torch form of `op.silu_qkv`; arguments checked there."""
    return _SiluQkv.apply(x if x.is_contiguous() else x.contiguous(), heads)
