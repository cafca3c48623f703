"""SiLU on the lightning layer's projection, and its split into q, k and v per head."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.cpu import passes

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Form = Literal["auto", "torch"]


def silu_qkv(x: Tensor, heads: int, *, form: Form = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """silu(x), cut into q, k and v.

    Args:
        x: [T, 3 H D], any float dtype; of each head [q | k | v], split after the view.
        heads: H.
        form: `auto` takes Triton for the backward on CUDA, and torch on a CPU, for fp64 and under
            `torch.compile`.

    Returns: q, k, v [T, H, D], views of one tensor: read only.

    Raises:
        ValueError: if x is not [T, 3 H D].

    Source: the released model code of MiniMax-01.

    Example:
        >>> q, k, v = silu_qkv(torch.arange(6.0)[None], 2)
        >>> torch.equal(k[0, :, 0], torch.nn.functional.silu(torch.tensor([1.0, 4.0])))
        True
    """
    if x.ndim != 2 or heads < 1 or x.shape[1] % (3 * heads):
        raise ValueError(
            f"x {tuple(x.shape)}, heads = {heads}: expected [T, 3 H D], a multiple of {3 * heads}"
        )
    if form == "auto" and _runs_triton(x):
        # not at the top: torch for CPU comes without triton
        from model.kernels.qkv.launch import silu_qkv_triton

        return silu_qkv_triton(x, heads)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        q, k, v = _SiluQKV.apply(x, heads)
    else:
        q, k, v = F.silu(x).view(x.shape[0], heads, -1).chunk(3, dim=-1)
    return q, k, v


class _SiluQKV(torch.autograd.Function):
    """q, k and v with heads outermost in memory, as the attention on a CPU reads them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x)
        if _runs_passes(x, heads):
            q, k, v = passes.silu_qkv(x, heads).transpose(1, 2).unbind(0)
            return q, k, v
        mixed = x.view(x.shape[0], heads, 3, -1).permute(2, 1, 0, 3)
        out = torch.empty(mixed.shape, dtype=x.dtype, device=x.device)
        if x.dtype.itemsize == 2 and x.device.type == "cpu":
            # torch's vector loop takes 64 numbers of 16 bits at once, more than D may hold; one by
            # one SiLU costs twelve times the copy and the dense pass together
            F.silu(out.copy_(mixed), inplace=True)
        else:
            torch.ops.aten.silu.out(mixed, out=out)
        q, k, v = out.transpose(1, 2).unbind(0)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if _runs_passes(x, grads[0].shape[1]):
            return passes.silu_qkv_grad(x, grads), None
        out = torch.cat(grads, dim=-1).view_as(x)
        # in place: large fresh memory costs more than the pass itself
        torch.ops.aten.silu_backward.grad_input(out, x, grad_input=out)
        return out, None


def _runs_triton(x: Tensor) -> bool:
    is_supported = x.is_cuda and x.dtype in TRITON_DTYPES and x.numel() > 0
    return is_supported and not torch.compiler.is_compiling()


def _runs_passes(x: Tensor, heads: int) -> bool:
    return passes.takes(x) and x.shape[1] <= 3 * heads * passes.MAX_SIZE
