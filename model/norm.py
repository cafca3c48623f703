"""RMSNorm: statistics in fp32 (fp64 stays), scaled in the dtype of the activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        size: channels normalised together.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[.., C] -> [.., C] in the dtype of x."""
        weight = self.weight.to(x.dtype)
        exact = x.dtype in (torch.float32, torch.float64)
        if x.device.type == "cpu" and exact and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, weight, self.eps)
        # one kernel on CUDA, which takes one dtype only; fp32 inside, whatever the dtype of x
        return F.rms_norm(x, weight.shape, weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """The norm in few passes over memory; torch has no fused one on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = grad * normed
        to_x = to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = product.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            along = (product @ weight).div_(-x.shape[-1]).unsqueeze(-1)
            to_x = torch.mul(grad, weight, out=product).addcmul_(normed, along).mul_(scale)
        return to_x, to_weight, None
