"""The expert layer in torch matmuls, one an expert; on a CPU in pieces that fit the core's cache.

One autograd function holds all experts: backward needs [g | u] only, writes both halves of its
gradient in place, and gets the gradient of p from that of silu(g) * u, so that no expert's output
is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.cpu import passes
from model.kernels.linear.op import CACHED_ROWS, FEW_ROWS, is_faster_here, product, weight_grad


def expert_layer_blocks(
    x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """Same numbers as `experts_reference`; arguments checked by `op.expert_layer`.

    On CUDA it waits for the device to learn how many tokens each expert has.
    """
    num_experts = len(gate_up)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=num_experts + 1).tolist()[:num_experts]
    order = order[: sum(counts)]
    scale = weights.flatten().index_select(0, order)[:, None].to(x.dtype)
    return _Experts.apply(x, gate_up, down, scale, order // chosen.shape[1], counts)


# oneDNN, which multiplies 16-bit numbers too, builds a new kernel for every number of rows it meets
# (0.6 ms on one core); so only multiples of this are asked, or of `least_rows` where rows are few
_ROW_STEP = 64
# BLAS multiplies fewer than four rows a thread by other code, which rounds otherwise; with these a
# row's bits do not depend on how many others chose its expert
ROWS_A_THREAD = 8


def least_rows(x: Tensor) -> int:
    """Rows from which a product on the device of x gives each row bits of its own."""
    return ROWS_A_THREAD * torch.get_num_threads() if x.device.type == "cpu" else 1


class _Piece(NamedTuple):
    """Rows of one expert: they lie at `own` among all rows, and hold `token`, weighted by `scale`.

    The last row may be repeated with a weight of 0, so that token is longer than own.
    """

    expert: int
    own: slice
    token: Tensor
    scale: Tensor


def _pieces(
    x: Tensor, gate_up: Tensor, token: Tensor, scale: Tensor, counts: Sequence[int]
) -> Iterator[_Piece]:
    start = 0
    for expert, count in enumerate(counts):
        end = start + count
        small = is_faster_here(x, gate_up[expert]) and count >= FEW_ROWS
        size = CACHED_ROWS if small else max(count, 1)
        for first in range(start, end, size):
            own = slice(first, min(first + size, end))
            rows, weight = token[own], scale[own]
            extra = _extra_rows(x, len(rows), small)
            if extra:
                rows = torch.cat((rows, rows[-1:].expand(extra)))
                weight = F.pad(weight, (0, 0, 0, extra))
            yield _Piece(expert, own, rows, weight)
        start = end


def _extra_rows(x: Tensor, count: int, is_small: bool) -> int:
    """Rows to repeat after `count` of them."""
    extra = least = least_rows(x)
    extra -= count
    if is_small or (x.is_cpu and x.dtype.itemsize == 2):
        extra = max(extra, -count % (_ROW_STEP if count > _ROW_STEP else least))
    return max(extra, 0)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        scale: Tensor,
        token: Tensor,
        counts: Sequence[int],
    ) -> Tensor:
        out, kept = torch.zeros_like(x), []
        for piece in _pieces(x, gate_up, token, scale, counts):
            inner = product(x.index_select(0, piece.token), gate_up[piece.expert])
            outer = product(_swiglu(inner), down[piece.expert])
            _add_rows(out, piece, outer, piece.scale)
            kept.append(inner)
        ctx.save_for_backward(x, gate_up, down, scale, token, *kept)
        ctx.counts = counts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, scale, token, *kept = ctx.saved_tensors
        needs_x, needs_gate_up, needs_down, needs_scale = ctx.needs_input_grad[:4]
        to_x = torch.zeros_like(x) if needs_x else None
        to_scale = torch.empty_like(scale) if needs_scale else None
        to_gate_up: list[Tensor | None] = [None] * len(ctx.counts)
        to_down: list[Tensor | None] = [None] * len(ctx.counts)
        pieces = _pieces(x, gate_up, token, scale, ctx.counts)
        for piece, inner in zip(pieces, kept, strict=True):
            expert = piece.expert
            own_grad = grad.index_select(0, piece.token)
            back = product(own_grad, down[expert].t())
            joined, slope, dots = _swiglu_grad(inner, back, piece.scale)
            if to_scale is not None:
                to_scale[piece.own] = dots[: piece.own.stop - piece.own.start]
            if needs_down:
                to_down[expert] = weight_grad(own_grad, joined, to_down[expert])
            if needs_gate_up:
                rows = x.index_select(0, piece.token)
                to_gate_up[expert] = weight_grad(slope, rows, to_gate_up[expert])
            if to_x is not None:
                _add_rows(to_x, piece, product(slope, gate_up[expert].t()))
        return (
            to_x,
            _stack(to_gate_up, gate_up) if needs_gate_up else None,
            _stack(to_down, down) if needs_down else None,
            to_scale,
            None,
            None,
        )


def _swiglu(inner: Tensor) -> Tensor:
    if passes.takes(inner):
        return passes.swiglu(inner)
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_grad(inner: Tensor, back: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `passes.swiglu_grad`; overwrites back."""
    if passes.takes(inner):
        return passes.swiglu_grad(inner, back, scale)
    gate, up = inner.chunk(2, dim=-1)
    active = F.silu(gate)
    joined = active * up
    dots = torch.linalg.vecdot(back, joined)[:, None]
    slope = torch.empty_like(inner)
    to_gate, to_up = slope.chunk(2, dim=-1)
    torch.mul(back.mul_(scale), active, out=to_up)
    torch.ops.aten.silu_backward.grad_input(back.mul_(up), gate, grad_input=to_gate)
    return joined.mul_(scale), slope, dots


def _add_rows(out: Tensor, piece: _Piece, x: Tensor, scale: Tensor | None = None) -> None:
    """out[token] += scale * x; overwrites x."""
    if passes.takes(out):
        own = piece.own.stop - piece.own.start
        return passes.add_rows(out, piece.token[:own], x, scale)
    out.index_add_(0, piece.token, x if scale is None else x.mul_(scale))


def _stack(grads: Sequence[Tensor | None], weights: Tensor) -> Tensor:
    """One gradient an expert, zero where an expert had no row."""
    return torch.stack([torch.zeros_like(weights[0]) if g is None else g for g in grads])
