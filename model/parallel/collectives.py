"""Collectives with gradients: each backward is the exact adjoint of its forward.

So the loss that is differentiated is the sum of what all ranks call their loss: what every rank
computes alike, each must weigh by one over their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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


def scatter_parts(x: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """[T, ...] of each rank -> [T', ...], this rank's rows of their sum, with gradients.

    Args:
        sizes: rows of each rank.
    """
    return _ScatterParts.apply(x, tuple(sizes), axis)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[...] of each rank -> [ranks, ...]; no gradient."""
    out = x.new_empty(axis.size, *x.shape)
    _gather(out.flatten(), x.contiguous().flatten(), group=axis.group)
    return out


def start_all_gather(x: Tensor, axis: Axis) -> tuple[Tensor, dist.Work]:
    """[...] of each rank -> [ranks, ...], to be read once the work is waited for; no gradient."""
    out = x.new_empty(axis.size, *x.shape)
    work = _gather(out.flatten(), x.contiguous().flatten(), group=axis.group, async_op=True)
    return out, work


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """All-to-all of rows: the first send[0] rows go to rank 0, and so on, with gradients.

    Args:
        x: [sum of send, ...].
        send, receive: rows to and from each rank.

    Returns: [sum of receive, ...], by sender.
    """
    return _Exchange.apply(x, list(send), list(receive), axis)


@dataclass
class Voyage:
    """Rows on their way through an all-to-all, and later their gradients on the way back.

    `start_exchange` and `end_exchange` each are a node of the graph: what lies between them runs
    beside the exchange, in backward too.
    """

    send: list[int]
    receive: list[int]
    axis: Axis
    _gone: tuple[Tensor, Tensor, dist.Work] | None = field(default=None, init=False)

    def go(self, x: Tensor, *, is_back: bool) -> Tensor:
        send, receive = (self.receive, self.send) if is_back else (self.send, self.receive)
        out, x = x.new_empty(sum(receive), *x.shape[1:]), x.contiguous()
        work = dist.all_to_all_single(out, x, receive, send, group=self.axis.group, async_op=True)
        # what is sent lives until it has arrived
        self._gone = out, x, work
        return out

    def come(self) -> Tensor:
        assert self._gone is not None, "sent before"
        out, _, work = self._gone
        work.wait()
        self._gone = None
        return out


def start_exchange(x: Tensor, voyage: Voyage) -> Tensor:
    """`exchange` up to the waiting: to be given to `end_exchange`, and not to be read before."""
    return _StartExchange.apply(x, voyage)


def end_exchange(x: Tensor, voyage: Voyage) -> Tensor:
    """What `start_exchange` gave, once it is there."""
    return _EndExchange.apply(x, voyage)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's x, with gradients."""
    return _SumOver.apply(x, axis)


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.sizes, ctx.axis = sizes, axis
        return _gathered(x, sizes, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _scattered(grad, ctx.sizes, ctx.axis), None, None


class _ScatterParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.sizes, ctx.axis = sizes, axis
        return _scattered(x, sizes, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gathered(grad, ctx.sizes, ctx.axis), None, None


def _gathered(x: Tensor, sizes: tuple[int, ...], axis: Axis) -> Tensor:
    most = max(sizes)
    gathered = all_gather(_padded(x, most), axis)
    if min(sizes) == most:
        return gathered.flatten(0, 1)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def _scattered(x: Tensor, sizes: tuple[int, ...], axis: Axis) -> Tensor:
    most, own = max(sizes), sizes[axis.rank]
    if min(sizes) == most:
        parts = x.contiguous()
    else:
        parts = torch.cat([_padded(part, most) for part in x.split(sizes)])
    out = x.new_empty(most, *x.shape[1:])
    _reduce_scatter(out.flatten(), parts.flatten(), group=axis.group)
    return out[:own]


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


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, voyage: Voyage) -> Tensor:
        ctx.voyage = voyage
        return voyage.go(x, is_back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.voyage.come(), None


class _EndExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, voyage: Voyage) -> Tensor:
        voyage.come()
        ctx.voyage = voyage
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # autograd wants a gradient of this shape; the voyage holds what travels
        ctx.voyage.go(grad, is_back=True)
        return grad, None


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
