"""Lightning attention in C, block after block of each sequence and head: `../cpu/lightning.c`.

Kept for backward are q, k, v and the initial states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.cpu import passes

# tokens a block, as in lightning.c
BLOCK = 32


def lightning_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    lengths: Sequence[int],
    *,
    initial_state: Tensor | None = None,
    with_final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Same numbers as `lightning_reference`; arguments checked by `op.lightning_attention`."""
    return _Lightning.apply(q, k, v, initial_state, slopes, tuple(lengths), with_final)


def _empty(like: Tensor) -> Tensor:
    """[T, H, D], heads outermost in memory."""
    total, heads, size = like.shape
    return like.new_empty(heads, total, size).transpose(0, 1)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _state(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def lightning_step_rows(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, states: Tensor, index: Tensor
) -> Tensor:
    """Same numbers as the torch form of `op.lightning_step`; arguments checked there."""
    out = torch.empty(q.shape, dtype=v.dtype)
    rows = {"q": _dense(q), "k": _dense(k), "v": _dense(v), "out": out}
    passes.lightning_step(rows, states, slopes, index)
    return out


class _Lightning(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        initial: Tensor | None,
        slopes: Tensor,
        lengths: tuple[int, ...],
        with_final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.lengths, ctx.initial_dtype = lengths, None if initial is None else initial.dtype
        q, k, v, initial = _dense(q), _dense(k), _dense(v), _state(initial)
        distance = torch.arange(BLOCK + 1, dtype=torch.float32)
        powers = torch.exp(-slopes.float()[:, None] * distance)
        heads, size = q.shape[1:]
        out = _empty(q)
        final = powers.new_empty(len(lengths), heads, size, size) if with_final else None
        rows, states = {"q": q, "k": k, "v": v, "out": out}, {"initial": initial, "final": final}
        passes.lightning("lightning_fwd", rows, states, powers, lengths)
        ctx.save_for_backward(q, k, v, initial, powers)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, final_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, initial, powers = ctx.saved_tensors
        grad = torch.zeros_like(q) if grad is None else _dense(grad)
        to_q, to_k, to_v = map(_empty, (q, k, v))
        to_initial = torch.empty_like(initial) if ctx.needs_input_grad[3] else None
        rows = {"q": q, "k": k, "v": v, "out": grad, "to_q": to_q, "to_k": to_k, "to_v": to_v}
        states = {"initial": initial, "to_final": _state(final_grad), "to_initial": to_initial}
        passes.lightning("lightning_bwd", rows, states, powers, ctx.lengths)
        if to_initial is not None:
            to_initial = to_initial.to(ctx.initial_dtype)
        return to_q, to_k, to_v, to_initial, None, None, None
