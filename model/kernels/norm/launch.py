"""Autograd and launches of the norms of a block.

Kept for backward are inputs and one fp32 number a row; sums and normed rows are made again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.runtime import driver

from model.kernels.norm import kernel

# tensors of whole rows that a backward reads
READ = 4


@dataclass(frozen=True)
class Shape:
    """How rows of one width are shared out.

    Args:
        rows: rows a tile.
        warps: of a program.
        residents: programs a multiprocessor, where programs walk over tiles.
        stages: 1 reads a tile when its turn comes; more read so many less one ahead.
    """

    rows: int
    warps: int
    residents: int = 1
    stages: int = 1


def forward_shape(columns: int) -> Shape:
    """As measured on one H200: a tile a program, at the speed of memory from 2,048 channels on."""
    padded = triton.next_power_of_2(columns)
    return Shape(max(1, 2048 // padded), warps=4 if padded <= 2048 else 8)


def backward_shape(columns: int, *, item_bytes: int, shared_bytes: int, is_gated: bool) -> Shape:
    """As measured on one H200.

    A wide row fills a multiprocessor's registers, so that only reading ahead hides its latency;
    narrow ones are shared by several programs. The gate's exponentials leave less time to hide.

    Args:
        item_bytes: of one number of the widest tensor.
        shared_bytes: that a program may have.
    """
    padded = triton.next_power_of_2(columns)
    if padded < 2048 or (padded == 2048 and not is_gated):
        return Shape(4096 // padded, warps=4, residents=3 if padded == 2048 else 8)
    ahead = min(2, shared_bytes // (READ * padded * item_bytes + 2048))
    if padded == 2048:
        return Shape(1, warps=8, residents=2, stages=1 + ahead)
    return Shape(1, warps=16, stages=1 + ahead)


@dataclass(frozen=True)
class Device:
    multiprocessors: int
    shared_bytes: int


@functools.lru_cache(maxsize=16)
def _properties(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(2, 0)
    found = driver.active.utils.get_device_properties(device.index)
    return Device(found["multiprocessor_count"], found["max_shared_mem"])


def _backward_shape(x: Tensor, *others: Tensor | None, is_gated: bool) -> Shape:
    item_bytes = max(t.element_size() for t in (x, *others) if t is not None)
    shared_bytes = _properties(x.device).shared_bytes
    return backward_shape(
        x.shape[1], item_bytes=item_bytes, shared_bytes=shared_bytes, is_gated=is_gated
    )


def _rows(x: Tensor) -> Tensor:
    """[.., C] -> [T, C] whose rows are dense; a copy only where they are not."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense, whatever the strides of `like`."""
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def _programs(x: Tensor, shape: Shape) -> int:
    return min(
        triton.cdiv(x.shape[0], shape.rows), _properties(x.device).multiprocessors * shape.residents
    )


def _partial(x: Tensor, shape: Shape, is_wanted: bool) -> Tensor | None:
    """[programs, C] fp32: a row of partial sums a program."""
    if not is_wanted:
        return None
    return torch.empty((_programs(x, shape), x.shape[1]), dtype=torch.float32, device=x.device)


def _total(partial: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if partial is None else partial.sum(0).to(weight.dtype)


class _JoinNorm(torch.autograd.Function):
    """Gives the normed rows, and what the residual carries on, as two outputs.

    With PostNorm both are one memory: two outputs, so that their gradients come in apart and are
    added inside the kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        eps: float,
        gain: tuple[float, float],
        postnorm: bool,
    ) -> tuple[Tensor, Tensor]:
        total, columns = residual.shape
        out = _empty(residual, residual.dtype)
        rstd = torch.empty(total, dtype=torch.float32, device=residual.device)
        x = torch.empty_like(out) if branch is not None and not postnorm else None
        shape = forward_shape(columns)
        kernel.norm_fwd_join[(triton.cdiv(total, shape.rows),)](
            residual, branch, weight, x, out, rstd,
            residual.stride(0), 0 if branch is None else branch.stride(0),
            total, eps, *gain,
            C=columns, BC=triton.next_power_of_2(columns), BT=shape.rows,
            HAS_BRANCH=branch is not None, KEEPS_X=x is not None, num_warps=shape.warps,
        )  # fmt: skip
        ctx.gain, ctx.postnorm = (1.0, 1.0) if branch is None else gain, postnorm
        ctx.branch_dtype = residual.dtype if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        if x is None:
            ctx.save_for_backward(residual, branch, weight, rstd)
            return (out if postnorm else residual).detach(), out
        ctx.save_for_backward(x, None, weight, rstd)
        return x, out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dcarried: Tensor | None, dout: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        residual, branch, weight, rstd = ctx.saved_tensors
        if dout is None and dcarried is None:
            return (None,) * 6
        if dout is None and ctx.postnorm:
            dout, dcarried = dcarried, None
        # no gradient of the norm itself: x alone was used
        dout = torch.zeros_like(residual) if dout is None else _rows(dout)
        dcarried = None if dcarried is None else _rows(dcarried)
        alpha, beta = ctx.gain
        needs_residual, needs_branch, needs_weight = ctx.needs_input_grad[:3]
        # one tensor is both gradients where the gains are alike
        is_alike = alpha == beta and ctx.branch_dtype == dout.dtype
        is_shared = needs_residual and needs_branch and is_alike
        dresidual = _empty(dout, dout.dtype) if needs_residual else None
        dbranch = _empty(dout, ctx.branch_dtype) if needs_branch and not is_shared else None
        shape = _backward_shape(dout, residual, branch, is_gated=False)
        partial = _partial(dout, shape, needs_weight)
        kernel.norm_bwd_join[(_programs(dout, shape),)](
            dout, dcarried, residual, branch, weight, rstd, dresidual, dbranch, partial,
            dout.stride(0), 0 if dcarried is None else dcarried.stride(0),
            residual.stride(0), 0 if branch is None else branch.stride(0),
            dout.shape[0], alpha, beta,
            C=dout.shape[1], BC=triton.next_power_of_2(dout.shape[1]), BT=shape.rows,
            STAGES=shape.stages, HAS_BRANCH=branch is not None,
            HAS_CARRIED=dcarried is not None, POSTNORM=ctx.postnorm,
            HAS_DRESIDUAL=dresidual is not None, HAS_DBRANCH=dbranch is not None,
            HAS_DW=needs_weight, num_warps=shape.warps,
        )  # fmt: skip
        if is_shared:
            dbranch = dresidual
        return dresidual, dbranch, _total(partial, weight), None, None, None


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        total, columns = x.shape
        out = _empty(x, x.dtype)
        rstd = torch.empty(total, dtype=torch.float32, device=x.device)
        shape = forward_shape(columns)
        kernel.norm_fwd_gate[(triton.cdiv(total, shape.rows),)](
            x, gate, weight, out, rstd, x.stride(0), gate.stride(0), total, eps,
            C=columns, BC=triton.next_power_of_2(columns), BT=shape.rows, num_warps=shape.warps,
        )  # fmt: skip
        ctx.save_for_backward(x, gate, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, rstd = ctx.saved_tensors
        dout = _rows(dout)
        dx, dgate = _empty(x, x.dtype), _empty(x, gate.dtype)
        shape = _backward_shape(x, gate, is_gated=True)
        partial = _partial(dout, shape, ctx.needs_input_grad[2])
        kernel.norm_bwd_gate[(_programs(dout, shape),)](
            dout, x, gate, weight, rstd, dx, dgate, partial,
            dout.stride(0), x.stride(0), gate.stride(0), dout.shape[0],
            C=x.shape[1], BC=triton.next_power_of_2(x.shape[1]), BT=shape.rows,
            STAGES=shape.stages, HAS_DW=partial is not None, num_warps=shape.warps,
        )  # fmt: skip
        return dx, dgate, _total(partial, weight), None


def join_norm_triton(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    gain: tuple[float, float] = (1.0, 1.0),
    postnorm: bool = True,
) -> tuple[Tensor, Tensor]:
    """Same numbers as the torch form of `op.join_norm`; arguments checked there."""
    rows = None if branch is None else _rows(branch)
    carried, out = _JoinNorm.apply(
        _rows(residual), rows, weight.contiguous(), eps, (float(gain[0]), float(gain[1])), postnorm
    )
    return carried.view(residual.shape), out.view(residual.shape)


def norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same numbers as the torch form of `op.rms_norm`; arguments checked there."""
    return join_norm_triton(x, None, weight, eps)[1]


def gated_norm_triton(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same numbers as the torch form of `op.gated_norm`; arguments checked there."""
    return _GatedNorm.apply(_rows(x), _rows(gate), weight.contiguous(), eps).view(x.shape)
