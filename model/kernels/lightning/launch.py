"""Launches the kernels of lightning attention, forward and backward.

`hopper.py` runs 16-bit tensors of head size 64 or 128 on compute capability 9; `kernel.py` runs all
else, and the carries.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from model.kernels.lightning import hopper, kernel
from model.kernels.lightning.plan import Direction, FirstRows, Plan, plan_work

HOPPER_SIZES = (64, 128)
CHUNK_TOKENS = 64


@dataclass(frozen=True)
class Shape:
    """How a pass is cut for one dtype, head size and device.

    Args:
        chunk_tokens: tokens a chunk.
        columns: columns of v a program holds.
        warps, stages: of a program.
        residents: programs that one multiprocessor runs at once.
        is_hopper: whether `hopper.py` runs it, wherever strides and addresses allow bulk copies.
    """

    chunk_tokens: int
    columns: int
    warps: int
    stages: int
    residents: int
    is_hopper: bool = False


def choose_shape(dtype: torch.dtype, size: int, *, is_hopper: bool) -> Shape:
    """16 bits as measured on one H200; fp32 keeps IEEE products, which only registers limit."""
    padded = max(triton.next_power_of_2(size), 16)
    if dtype == torch.float32:
        return Shape(16, 16, 8, 1, 2)
    if is_hopper and size in HOPPER_SIZES:
        return Shape(CHUNK_TOKENS, size, size // 16, 2, 128 // size, is_hopper=True)
    if padded > 128:
        return Shape(CHUNK_TOKENS, 64, 8, 1, 1)
    return Shape(CHUNK_TOKENS, min(padded, 64), 4, 2, 2)


@functools.lru_cache(maxsize=16)
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _plan(lengths: Sequence[int], q: Tensor, shape: Shape, is_split: bool) -> Plan:
    heads, size = q.shape[1:]
    return plan_work(
        tuple(lengths),
        heads=heads * triton.cdiv(size, shape.columns),
        programs=_multiprocessors(q.device) * shape.residents,
        chunk_tokens=shape.chunk_tokens,
        is_split=is_split,
        device=q.device,
    )


def _strides(state: Tensor | None, is_transposed: bool) -> tuple[int, int]:
    """Row and column stride of [.., D, D] states, or of their transposes."""
    if state is None:
        return 0, 0
    row, column = state.stride(-2), state.stride(-1)
    return (column, row) if is_transposed else (row, column)


def _can_copy(*tensors: Tensor) -> bool:
    """Whether bulk copies can read these [T, H, D]: addresses and rows on 16 bytes, rows apart."""
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(0) % 8 == 0
        and x.stride(1) >= x.shape[2]
        and x.stride(0) >= (x.shape[1] - 1) * x.stride(1) + x.shape[2]
        for x in tensors
    )


def _descriptor(x: Tensor) -> TensorDescriptor:
    """[T, H, D] as rows of all heads, copied in blocks of a chunk of one head."""
    block = [CHUNK_TOKENS, x.shape[2]]
    columns = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    dtype = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, [x.shape[0], columns], [x.stride(0), 1], block, layout)


@dataclass(frozen=True)
class Pass:
    """One direction over the packed tokens: who runs, with which slopes and shape."""

    shape: Shape
    chunks: Tensor
    direction: Direction
    slopes: Tensor
    is_reverse: bool

    def carries(
        self, k: Tensor, v: Tensor, initial: Tensor | None, is_transposed: bool = False
    ) -> Tensor | None:
        """[C, H, D, D] fp32: what enters each segment that continues a sequence; None if none."""
        work, heads, size = self.direction, k.shape[1], k.shape[2]
        if not work.num_carries:
            return None
        padded = max(triton.next_power_of_2(size), 16)
        is_wide = k.dtype == torch.float32
        columns = min(padded, 32 if is_wide else 128 if padded <= 128 else 64)
        partial = k.new_empty(work.num_pieces, heads, size, size, dtype=torch.float32)
        kernel.lightning_carry_pieces[triton.cdiv(size, columns), heads, work.num_pieces](
            k, v, self.slopes, work.pieces, partial,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            heads,
            DK=size, DV=size, BK=padded, BV=columns, BT=32 if is_wide else 64,
            REVERSE=self.is_reverse, PRECISION="ieee", num_warps=8, num_stages=1 if is_wide else 3,
        )  # fmt: skip
        carry = k.new_empty(work.num_carries, heads, size, size, dtype=torch.float32)
        kernel.lightning_carry_scan[triton.cdiv(size * size, 1024), heads](
            partial, initial, carry, self.slopes, work.pieces, work.carries,
            work.num_carries, *_strides(initial, is_transposed),
            heads,
            DK=size, DV=size, BLOCK=1024,
            REVERSE=self.is_reverse, HAS_INIT=initial is not None, num_warps=4,
        )  # fmt: skip
        return carry

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        carry: Tensor | None,
        initial: Tensor | None,
        final: Tensor | None = None,
        out: Tensor | None = None,
        is_transposed: bool = False,
    ) -> Tensor:
        """[T, H, D] in the dtype of v, `out` where given; the states are [D of v, D of k] if
        transposed."""
        total, heads, size = q.shape
        if out is None:
            out = torch.empty((total, heads, size), dtype=v.dtype, device=v.device)
        work, shape = self.direction, self.shape
        states = (
            *_strides(carry, is_transposed),
            *_strides(initial, is_transposed),
            *_strides(final, is_transposed),
        )
        has = {
            "HAS_CARRY": carry is not None,
            "HAS_INIT": initial is not None,
            "HAS_FINAL": final is not None,
        }
        if shape.is_hopper and _can_copy(q, k, v):
            hopper.lightning_run_hopper[heads, work.num_segments](
                _descriptor(q), _descriptor(k), _descriptor(v), out, self.slopes, self.chunks,
                work.segments, carry, initial, final,
                q.stride(1), k.stride(1), v.stride(1), out.stride(0), out.stride(1),
                *states, heads,
                D=size, BT=shape.chunk_tokens, STAGES=shape.stages, REVERSE=self.is_reverse, **has,
                num_warps=shape.warps,
            )  # fmt: skip
            return out
        shape = choose_shape(q.dtype, size, is_hopper=False)
        kernel.lightning_run[triton.cdiv(size, shape.columns), heads, work.num_segments](
            q, k, v, out, self.slopes, self.chunks, work.segments, carry, initial, final,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            v.stride(0), v.stride(1), out.stride(0), out.stride(1),
            *states, heads,
            DK=size, DV=size, BK=max(triton.next_power_of_2(size), 16), BV=shape.columns,
            BT=shape.chunk_tokens, REVERSE=self.is_reverse, **has, PRECISION="ieee",
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        return out

    def keys_values(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        *,
        carry: Tensor | None,
        initial: Tensor | None,
        final: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """dk and dv [T, H, D], backwards in time; the states are gradients of states."""
        if not (self.shape.is_hopper and _can_copy(q, k, v, do)):
            dk = self.run(v, do, q, carry=carry, initial=initial, is_transposed=True)
            return dk, self.run(k, q, do, carry=carry, initial=initial, final=final)
        total, heads, size = q.shape
        dk = torch.empty((total, heads, size), dtype=k.dtype, device=k.device)
        dv = torch.empty_like(dk)
        hopper.lightning_bwd_keys_values[heads, self.direction.num_segments](
            _descriptor(q), _descriptor(k), _descriptor(v), _descriptor(do), dk, dv, self.slopes,
            self.chunks, self.direction.segments, carry, initial, final,
            q.stride(1), k.stride(1), v.stride(1), do.stride(1),
            dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1), heads,
            D=size, BT=self.shape.chunk_tokens, STAGES=self.shape.stages,
            HAS_CARRY=carry is not None, HAS_INIT=initial is not None,
            HAS_FINAL=final is not None, num_warps=self.shape.warps,
        )  # fmt: skip
        return dk, dv


class _Lightning(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        initial: Tensor | None,
        lengths: tuple[int, ...],
        with_final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        shape = choose_shape(q.dtype, q.shape[2], is_hopper=_is_hopper(q.device))
        plan = _plan(lengths, q, shape, initial is not None or with_final)
        forwards = Pass(shape, plan.chunks, plan.forward, slopes, False)
        carry = forwards.carries(k, v, initial)
        final = None
        if with_final:
            heads, size = q.shape[1:]
            final = q.new_empty(len(lengths), heads, size, size, dtype=torch.float32)
        out = forwards.run(q, k, v, carry=carry, initial=initial, final=final)
        ctx.save_for_backward(q, k, v, slopes, initial, carry)
        ctx.plan, ctx.shape = plan, shape
        # an unused final state then has no gradient, instead of one of zeros
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, initial, carry = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else _rows(do)
        dfinal = None if dfinal is None else dfinal.contiguous()
        forwards = Pass(ctx.shape, ctx.plan.chunks, ctx.plan.forward, slopes, False)
        dq = forwards.run(do, v, k, carry=carry, initial=initial, is_transposed=True)
        back = Pass(ctx.shape, ctx.plan.chunks, ctx.plan.backward, slopes, True)
        dcarry = back.carries(q, do, dfinal)
        dinitial = torch.empty_like(initial) if ctx.needs_input_grad[4] else None
        dk, dv = back.keys_values(q, k, v, do, carry=dcarry, initial=dfinal, final=dinitial)
        return dq, dk, dv, None, dinitial, None, None


def _rows(x: Tensor) -> Tensor:
    """x itself if the last dim is dense, else a dense copy: kernels read rows of D."""
    return x if x.stride(-1) == 1 else x.contiguous()


def lightning_triton(
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
    initial = None if initial_state is None else initial_state.contiguous()
    return _Lightning.apply(
        _rows(q),
        _rows(k),
        _rows(v),
        slopes.float().contiguous(),
        initial,
        tuple(lengths),
        with_final,
    )


def lightning_piece_triton(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, states: Tensor, rows: FirstRows
) -> Tensor:
    """Same numbers as the torch form of `op.lightning_piece`; arguments checked there."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    shape = choose_shape(q.dtype, q.shape[2], is_hopper=_is_hopper(q.device))
    chunks, work = rows.plan(len(q), chunk_tokens=shape.chunk_tokens)
    # rows that no chunk holds are not written
    out = torch.zeros(q.shape, dtype=v.dtype, device=v.device)
    forwards = Pass(shape, chunks, work, slopes.float().contiguous(), False)
    # each program reads its part of the slot's state before it writes it
    return forwards.run(q, k, v, carry=None, initial=states, final=states, out=out)


def lightning_step_triton(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, states: Tensor, index: Tensor
) -> Tensor:
    """Same numbers as the torch form of `op.lightning_step`; arguments checked there."""
    count, heads, size = q.shape
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = torch.empty((count, heads, size), dtype=v.dtype, device=v.device)
    padded = triton.next_power_of_2(size)
    columns = min(padded, 32)
    kernel.lightning_step[triton.cdiv(size, columns), heads, count](
        q, k, v, out, slopes.float(), states, index,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        states.stride(0),
        heads,
        D=size, BD=padded, BV=columns, num_warps=4,
    )  # fmt: skip
    return out
