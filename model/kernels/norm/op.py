"""The norms of a block: the entries, which choose the form.

Triton on CUDA (`launch.py`), C on a CPU where it was built (`rows.py`), torch elsewhere. Statistics
are fp32 (fp64 stays), whatever the dtype.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.cpu import passes
from model.kernels.norm.rows import norm_rows

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# one program holds whole rows in registers
MAX_TRITON_COLUMNS = 8192

Form = Literal["auto", "torch"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, form: Form = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: [.., C], bf16, fp16, fp32 or fp64.
        weight: [C], any of these.
        eps: added to the mean square.
        form: `auto` takes Triton on CUDA and C on a CPU, and torch for fp64, on CUDA for
            C > 8,192, and under `torch.compile`.

    Returns: [.., C] in the dtype of x.

    Raises:
        ValueError: if shapes or devices do not fit.

    Example:
        >>> rms_norm(torch.tensor([[3.0, -3.0]]), torch.tensor([1.0, 2.0]), 0.0).round()
        tensor([[ 1., -2.]])
    """
    _check(weight, x=x)
    if form == "auto" and _runs_triton(x):
        # not at the top: torch for CPU comes without triton
        from model.kernels.norm.launch import norm_triton

        return norm_triton(x, weight, eps)
    if form == "auto" and passes.takes(x):
        return norm_rows(x, None, weight, eps)[1]
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        wide = torch.promote_types(x.dtype, torch.float32)
        return _RMSNorm.apply(x.to(wide), weight.to(wide), eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def join(residual: Tensor, branch: Tensor, gain: tuple[float, float]) -> Tensor:
    """alpha * residual + beta * branch, gain = (alpha, beta).

    Example:
        >>> join(torch.ones(2), torch.ones(2), (2.0, 0.5))
        tensor([2.5000, 2.5000])
    """
    alpha, beta = gain
    return torch.add(branch if beta == 1 else beta * branch, residual, alpha=alpha)


def join_norm(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    gain: tuple[float, float] = (1.0, 1.0),
    postnorm: bool = True,
    form: Form = "auto",
) -> tuple[Tensor, Tensor]:
    """x = alpha * residual + beta * branch, and its norm.

    Args:
        residual: [.., C]; branch: alike, or None, where x is the residual itself. Their dtypes
            may differ, as under autocast; the wider one wins.
        weight: [C]; eps: as above.
        gain: alpha and beta.
        postnorm: whether the residual carries the norm on, or x.
        form: as above.

    Returns: what the residual carries on, and the norm; both [.., C].
        They may share memory with each other or with residual: read only.

    Raises:
        ValueError: if shapes or devices do not fit.

    Source: MiniMax-01 report, section 4.2 (DeepNorm's alpha and beta).

    Example:
        >>> two = torch.full((1, 2), 2.0)
        >>> x, normed = join_norm(two, two, torch.ones(2), 0.0, gain=(2.0, 1.0), postnorm=False)
        >>> x, normed.round()
        (tensor([[6., 6.]]), tensor([[1., 1.]]))
    """
    _check(weight, residual=residual, branch=branch)
    if form == "auto" and _runs_triton(residual, branch):
        from model.kernels.norm.launch import join_norm_triton

        return join_norm_triton(residual, branch, weight, eps, gain=gain, postnorm=postnorm)
    if form == "auto" and _runs_passes(residual, branch):
        return norm_rows(residual, branch, weight, eps, gain=gain, postnorm=postnorm)
    x = residual if branch is None else join(residual, branch, gain)
    normed = rms_norm(x, weight, eps, form=form)
    return normed if postnorm else x, normed


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, form: Form = "auto"
) -> Tensor:
    """sigmoid(gate) * rms_norm(x): the norm over all heads of a lightning layer, and its gate.

    Args:
        x, gate: [.., C], C = H * D; of two dtypes, the wider one wins.
        weight: [C]; eps, form: as above.

    Returns: [.., C].

    Raises:
        ValueError: if shapes or devices do not fit.

    Source: MiniMax-01 report, section 2.2; the released model code.

    Example:
        >>> gated_norm(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(2), 0.0)
        tensor([[0.5000, 0.5000]])
    """
    _check(weight, x=x, gate=gate)
    if form == "auto" and _runs_triton(x, gate):
        from model.kernels.norm.launch import gated_norm_triton

        return gated_norm_triton(x, gate, weight, eps)
    if form == "auto" and _runs_passes(x, gate):
        return norm_rows(x, gate, weight, eps, role="gate")[1]
    return torch.sigmoid(gate) * rms_norm(x, weight, eps, form=form)


def _check(weight: Tensor, **rows: Tensor | None) -> None:
    """The first of `rows` says what the others must be."""
    first, x = next(iter(rows.items()))
    assert x is not None, "only a later one may be missing"
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)}, expected [C] = [{x.shape[-1]}] of {first}")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, {first} on {x.device}")
    for name, other in rows.items():
        if other is None:
            continue
        if other.shape != x.shape or other.device != x.device:
            raise ValueError(
                f"{name} {tuple(other.shape)} on {other.device}, expected as {first}: "
                f"{tuple(x.shape)} on {x.device}"
            )


def _runs_triton(x: Tensor, other: Tensor | None = None) -> bool:
    # under autocast a branch may be narrower than the residual that it joins
    other_dtype = x.dtype if other is None else other.dtype
    return (
        x.is_cuda
        and x.dtype in TRITON_DTYPES
        and torch.promote_types(x.dtype, other_dtype) == x.dtype
        and x.shape[-1] <= MAX_TRITON_COLUMNS
        and x.numel() > 0
        and not torch.compiler.is_compiling()
    )


def _runs_passes(x: Tensor, other: Tensor | None) -> bool:
    other_dtype = x.dtype if other is None else other.dtype
    return passes.takes(x, other) and torch.promote_types(x.dtype, other_dtype) == x.dtype


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
