"""Rotary positions of queries and keys: the entry, which chooses the form."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Form = Literal["auto", "torch"]


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, form: Form = "auto"
) -> tuple[Tensor, Tensor]:
    """Turns the leading R dimensions of each head, in pairs (i, i + R/2); the rest pass.

    Args:
        q: [T, H, D]; k: [T, G, D], of one float dtype.
        cos, sin: [T, 1, R] from `model.rotary.rotary_angles`, R even, <= D; no gradient.
        form: `auto` takes Triton on CUDA, which turns in fp32; torch, on a CPU, for fp64 and under
            `torch.compile`, turns in the dtype of q.

    Returns: q and k, turned.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.

    Example:
        >>> q = k = torch.tensor([[[1.0, 0.0, 7.0]]])
        >>> quarter = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
        >>> rotate(q, k, *quarter)[0]
        tensor([[[0., 1., 7.]]])
    """
    _check(q, k, cos, sin)
    if form == "auto" and _runs_triton(q):
        # not at the top: torch for CPU comes without triton
        from model.kernels.rotary.launch import rotate_triton

        return rotate_triton(q, k, cos, sin)
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    turning, passing = x[..., :size], x[..., size:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if size == x.shape[-1] else torch.cat((turned, passing), dim=-1)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape[::2] != q.shape[::2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}: expected [T, H, D] and [T, G, D]"
        )
    turning = cos.shape[-1]
    fits = cos.shape == (q.shape[0], 1, turning) and turning % 2 == 0 and turning <= q.shape[2]
    if cos.shape != sin.shape or not fits:
        raise ValueError(
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: expected both [T, 1, R] with "
            f"T = {q.shape[0]}, R even and <= D = {q.shape[2]}"
        )
    if q.dtype != k.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype}: expected one dtype")
    if not q.device == k.device == cos.device == sin.device:
        raise ValueError(
            f"q on {q.device}, k on {k.device}, cos on {cos.device}, sin on {sin.device}: "
            "expected one device"
        )


def _runs_triton(q: Tensor) -> bool:
    is_supported = q.is_cuda and q.dtype in TRITON_DTYPES and q.numel() > 0
    return is_supported and not torch.compiler.is_compiling()
