"""SiLU on the lightning layer's projection, and its split into q, k and v per head."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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
    q, k, v = F.silu(x).view(x.shape[0], heads, -1).chunk(3, dim=-1)
    return q, k, v


def _runs_triton(x: Tensor) -> bool:
    is_supported = x.is_cuda and x.dtype in TRITON_DTYPES and x.numel() > 0
    return is_supported and not torch.compiler.is_compiling()
