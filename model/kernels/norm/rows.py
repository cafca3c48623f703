"""The norms of a block in one pass of a CPU over the rows, forward and backward.

Kept for backward are inputs and one fp32 number a row.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.cpu import passes

Role = Literal["branch", "gate"]


def norm_rows(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    role: Role = "branch",
    gain: tuple[float, float] = (1.0, 1.0),
    postnorm: bool = True,
) -> tuple[Tensor, Tensor]:
    """What `op.join_norm` gives, or, where other is the gate, `op.gated_norm` twice.

    Args: checked there; the dtype of x is the wider one.
    """
    rows = None if other is None else passes.dense_rows(other)
    given = passes.dense_rows(x), rows, weight.float().contiguous()
    carried, out = _Norm.apply(*given, eps, role, gain, postnorm)
    return carried.view(x.shape), out.view(x.shape)


def _described(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor,
    eps: float,
    role: Role,
    gain: tuple[float, float],
) -> passes.Norm:
    joins = role == "branch" and other is not None
    alpha, beta = gain if joins else (1.0, 1.0)
    beside = {}
    if other is not None:
        beside = {
            role: other.data_ptr(),
            "other_step": other.stride(0),
            "is_other_short": passes.is_short(other),
        }
    return passes.Norm(
        x=x.data_ptr(), weight=weight.data_ptr(), x_step=x.stride(0), columns=x.shape[1],
        alpha=alpha, beta=beta, eps=eps, is_short=passes.is_short(x), **beside,
    )  # fmt: skip


class _Norm(torch.autograd.Function):
    """Gives what the residual carries on, and the normed rows.

    With PostNorm both are one memory: two outputs, so that their gradients come in apart and are
    added inside the pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        other: Tensor | None,
        weight: Tensor,
        eps: float,
        role: Role,
        gain: tuple[float, float],
        postnorm: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.given, ctx.postnorm = (eps, role, gain), postnorm
        out = x.new_empty(x.shape)
        total = x.new_empty(x.shape) if other is not None and not postnorm else None
        scale = torch.empty(len(x), dtype=torch.float32)
        described = _described(x, other, weight, eps, role, gain)
        passes.call("norm_fwd", ctypes.byref(described), total, out, scale, len(x))
        ctx.save_for_backward(x, other, weight, scale)
        if postnorm:
            return out.detach(), out
        return x.detach() if total is None else total, out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_carried: Tensor | None, to_out: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, other, weight, scale = ctx.saved_tensors
        if to_out is None and ctx.postnorm:
            to_out, to_carried = to_carried, None
        if to_out is None and to_carried is None:
            return (None,) * 7
        to_out = torch.zeros_like(x) if to_out is None else passes.dense_rows(to_out)
        to_x = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        to_other = other.new_empty(x.shape) if ctx.needs_input_grad[1] else None
        partial = weight.new_empty(-(-len(x) // passes.ROWS), x.shape[1])
        given = {"out": to_out, "x": to_x, "other": to_other, "weight": partial}
        steps = {"out_step": to_out.stride(0)}
        if to_carried is not None:
            to_carried = passes.dense_rows(to_carried)
            name = "twin" if ctx.postnorm else "sum"
            given[name], steps[f"{name}_step"] = to_carried, to_carried.stride(0)
        addresses = {key: t.data_ptr() for key, t in given.items() if t is not None}
        grads = passes.NormGrads(**addresses, **steps)
        described = _described(x, other, weight, *ctx.given)
        passes.call("norm_bwd", ctypes.byref(described), ctypes.byref(grads), scale, len(x))
        to_weight = partial.sum(0) if ctx.needs_input_grad[2] else None
        return to_x, to_other, to_weight, None, None, None, None
