"""x W^T for fp32 on a CPU, by oneDNN where it is faster than the BLAS that torch links.

torch sends fp32 matmuls to MKL, whose AVX-512 code serves Intel's processors only; on others oneDNN
does twice as many operations a second for the same fp32 result. Everything else (other dtypes and
devices, few rows, autocast) takes torch's own way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# below this many rows, packing the weight costs oneDNN more than it gains
_FEW_ROWS = 256


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, as `torch.nn.functional.linear` without a bias.

    Args:
        x: [.., C_in]; weight: [C_out, C_in], any dtype and device.

    Example:
        >>> linear(torch.ones(3, 2), torch.ones(4, 2))[0].tolist()
        [2.0, 2.0, 2.0, 2.0]
    """
    if not is_faster_here(x, weight):
        return F.linear(x, weight)
    return _Linear.apply(x, weight)


def is_faster_here(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may and should multiply these two."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.ndim == 2
        and x.shape[0] >= _FEW_ROWS
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """[T, C_in] x [C_out, C_in] -> [T, C_out], either operand of any strides; no gradient."""
    return _by_onednn(x, weight) if is_faster_here(x, weight) else x @ weight.t()


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x: [T, C_out], [T, C_in] -> [C_out, C_in]; no gradient."""
    # the longer side first is the faster, and equal sides gain nothing
    if grad.shape[1] == x.shape[1] or not is_faster_here(grad, x):
        return grad.t() @ x
    if grad.shape[1] > x.shape[1]:
        return _by_onednn(x.t(), grad.t()).t()
    return _by_onednn(grad.t(), x.t())


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            product(grad, weight.t()) if needs_x else None,
            weight_grad(grad, x) if needs_weight else None,
        )


class Linear(nn.Linear):
    """`nn.Linear` without a bias that multiplies by `linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
