"""Collectives with gradients: each backward is the exact adjoint of its forward.

So the loss that is differentiated is the sum of what all ranks call their loss: what every rank
computes alike, each must weigh by one over their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.parallel.mesh import Axis

# renamed in torch 2.13
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def gather_parts(x: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """[T', ...] of each rank -> [T, ...], one behind the other, with gradients.

    Args:
        sizes: rows of each rank.
    """
    return _GatherParts.apply(x, tuple(sizes), axis)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[...] of each rank -> [ranks, ...]; no gradient."""
    out = x.new_empty(axis.size, *x.shape)
    _gather(out.flatten(), x.contiguous().flatten(), group=axis.group)
    return out


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """All-to-all of rows: the first send[0] rows go to rank 0, and so on, with gradients.

    Args:
        x: [sum of send, ...].
        send, receive: rows to and from each rank.

    Returns: [sum of receive, ...], by sender.
    """
    return _Exchange.apply(x, list(send), list(receive), axis)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's x, with gradients."""
    return _SumOver.apply(x, axis)


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.sizes, ctx.axis = sizes, axis
        most = max(sizes)
        gathered = all_gather(_padded(x, most), axis)
        if min(sizes) == most:
            return gathered.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sizes, axis = ctx.sizes, ctx.axis
        most, own = max(sizes), sizes[axis.rank]
        if min(sizes) == most:
            parts = grad.contiguous()
        else:
            parts = torch.cat([_padded(part, most) for part in grad.split(sizes)])
        out = grad.new_empty(most, *grad.shape[1:])
        _reduce_scatter(out.flatten(), parts.flatten(), group=axis.group)
        return out[:own], None, None


def _padded(x: Tensor, rows: int) -> Tensor:
    """x with zero rows behind it."""
    return x if x.shape[0] == rows else F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - x.shape[0]))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
        ctx.send, ctx.receive, ctx.axis = send, receive, axis
        return _swap(x, send, receive, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _swap(grad, ctx.receive, ctx.send, ctx.axis), None, None, None


def _swap(x: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=axis.group)
    return out


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _summed(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(grad, ctx.axis), None


def _summed(x: Tensor, axis: Axis) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=axis.group)
    return out
