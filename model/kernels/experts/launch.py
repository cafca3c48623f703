"""Launches the kernels of the expert layer, forward and backward; nothing waits for the device.

    forward   spread x, product, SwiGLU, product, combine
    backward  spread dy, product, SwiGLU backward, two weight gradients, product, combine

Kept for the backward: x, [g | u] and the routing. A routing weight scales silu(g) * u, not dy, in
the backward, so that its own gradient is one row sum even where it is 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.experts import kernel
from model.kernels.experts.places import Places


@dataclass(frozen=True)
class Tile:
    """Shape of one program of a product: rows, columns, depth."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def choose_tile(dtype: torch.dtype) -> Tile:
    """fp32 keeps IEEE products, which only registers limit; 16 bits fit 99 KB of shared memory."""
    return Tile(64, 64, 32, 8, 2) if dtype == torch.float32 else Tile(128, 128, 64, 8, 3)


# tiles of rows that run at once over the same columns of a weight
GROUP = 8
# columns that one program of an elementwise kernel takes at once
MAX_COLUMNS = 2048


def _columns(size: int) -> int:
    return min(triton.next_power_of_2(size), MAX_COLUMNS)


def _padded(count: int) -> int:
    return max(triton.next_power_of_2(count), 2)


def sort_places(chosen: Tensor, num_experts: int) -> Places:
    """[T, K] int64 -> rows by expert, in each the order of the places (a counting sort)."""
    count, padded = chosen.numel(), _padded(num_experts)
    block = min(max(8192 // padded, 16), 256)
    num_blocks = triton.cdiv(count, block)
    counts = chosen.new_empty((num_experts, num_blocks), dtype=torch.int32)
    kernel.experts_count[(num_blocks,)](
        chosen, counts, count, num_experts, num_blocks, BP=block, BE=padded
    )
    sums = counts.flatten().cumsum(0, dtype=torch.int32).view_as(counts)
    position, place = counts.new_empty(count), counts.new_empty(count)
    kernel.experts_place[(num_blocks,)](
        chosen, counts, sums, position, place, count, num_experts, num_blocks, BP=block, BE=padded
    )
    return Places(sums[:, -1].contiguous(), position, place)


def spread(x: Tensor, position: Tensor) -> Tensor:
    """[T, C] -> [T * K, C]: each token copied to its rows."""
    tokens, size = x.shape
    rows = torch.empty((position.numel(), size), dtype=x.dtype, device=x.device)
    block = _columns(size)
    kernel.experts_spread[tokens, triton.cdiv(size, block)](
        x, position, rows, size, x.stride(0), K=position.numel() // tokens, BC=block
    )
    return rows


def combine(rows: Tensor, position: Tensor, weights: Tensor | None, tokens: int) -> Tensor:
    """[T * K, C] -> [T, C]: the (weighted) sum of each token's rows."""
    size = rows.shape[1]
    out = torch.empty((tokens, size), dtype=rows.dtype, device=rows.device)
    block = _columns(size)
    kernel.experts_combine[tokens, triton.cdiv(size, block)](
        rows, position, weights, out, size,
        K=position.numel() // tokens, BC=block, HAS_WEIGHTS=weights is not None,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=16)
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _has_kernel(x: Tensor, ends: Tensor, *sizes: int) -> bool:
    """Whether `torch._grouped_mm` multiplies matrices of these sizes by a kernel of its own.

    Elsewhere than on Hopper, and for other dtypes, it waits for the device, or errs for an expert
    without a token. Rows and addresses must lie on 16 bytes.
    """
    return (
        x.dtype == torch.bfloat16
        and _is_hopper(x.device)
        and x.data_ptr() % 16 == 0
        and len(ends) < 1024
        and all(size % 8 == 0 for size in sizes)
    )


def product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[rows, in] x [E, out, in] -> [rows, out], each row times its expert's matrix."""
    num_experts, size_out, size_in = weight.shape
    if _has_kernel(weight, ends, size_out, size_in):
        return torch._grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    out = torch.empty((rows.shape[0], size_out), dtype=rows.dtype, device=rows.device)
    tile = choose_tile(rows.dtype)
    # every expert may leave one tile part empty
    num_tiles = triton.cdiv(len(rows), tile.rows) + min(num_experts, len(rows))
    kernel.experts_product[(num_tiles * triton.cdiv(size_out, tile.columns),)](
        rows, weight, ends, out, num_tiles, num_experts, size_out, size_in, *weight.stride(),
        BM=tile.rows, BN=tile.columns, BK=tile.depth, BE=_padded(num_experts), GROUP=GROUP,
        PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def weight_grad(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """grad^T rows of each expert: [rows, out], [rows, in] -> [E, out, in], 0 without a row."""
    size_out, size_in = grad.shape[1], rows.shape[1]
    if _has_kernel(grad, ends, size_out, size_in):
        return torch._grouped_mm(grad.t(), rows, offs=ends)
    out = torch.empty((len(ends), size_out, size_in), dtype=grad.dtype, device=grad.device)
    tile = choose_tile(grad.dtype)
    grid = triton.cdiv(size_in, tile.columns), triton.cdiv(size_out, tile.rows), len(ends)
    kernel.experts_weight_grad[grid](
        grad, rows, ends, out, size_out, size_in,
        BM=tile.rows, BN=tile.columns, BK=tile.depth, PRECISION="ieee",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def swiglu(inner: Tensor, ends: Tensor) -> Tensor:
    """[rows, 2F] -> silu(g) * u [rows, F]."""
    count, size = inner.shape[0], inner.shape[1] // 2
    joined = torch.empty((count, size), dtype=inner.dtype, device=inner.device)
    block = _columns(size)
    kernel.experts_fwd_swiglu[count, triton.cdiv(size, block)](
        inner, joined, ends, size, len(ends), BF=block
    )
    return joined


def swiglu_backward(
    inner: Tensor, back: Tensor, weights: Tensor, places: Places
) -> tuple[Tensor, Tensor]:
    """Gradients of [g | u] and of the weights; `back` becomes weight * silu(g) * u."""
    count, size = back.shape
    dinner = torch.empty((count, 2 * size), dtype=inner.dtype, device=inner.device)
    # dropped places get none
    dweights = torch.zeros_like(weights)
    kernel.experts_bwd_swiglu[(count,)](
        inner, back, weights, places.place, places.ends, dinner, dweights, size, len(places.ends),
        BF=_columns(size),
    )  # fmt: skip
    return dinner, dweights


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, *places: Tensor
    ) -> Tensor:
        ends, position, _ = places
        inner = product(spread(x, position), gate_up, ends)
        outer = product(swiglu(inner, ends), down, ends)
        ctx.save_for_backward(x, gate_up, down, weights, inner, *places)
        return combine(outer, position, weights, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, weights, inner, *kept = ctx.saved_tensors
        places = Places(*kept)
        needs_x, needs_gate_up, needs_down, _ = ctx.needs_input_grad[:4]
        rows = spread(_rows(grad), places.position)
        back = product(rows, down.transpose(1, 2), places.ends)
        dinner, to_weights = swiglu_backward(inner, back, weights, places)
        to_down = weight_grad(rows, back, places.ends) if needs_down else None
        del rows, back
        to_x = to_gate_up = None
        if needs_gate_up:
            to_gate_up = weight_grad(dinner, spread(x, places.position), places.ends)
        if needs_x:
            outer = product(dinner, gate_up.transpose(1, 2), places.ends)
            to_x = combine(outer, places.position, None, len(x))
        return to_x, to_gate_up, to_down, to_weights, None, None, None


def _rows(x: Tensor) -> Tensor:
    """x itself if its rows are dense, else a dense copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def expert_layer_triton(
    x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """Same numbers as `experts_reference`; arguments checked by `op.expert_layer`."""
    places = sort_places(chosen.contiguous(), len(gate_up))
    return _Experts.apply(
        _rows(x), gate_up.contiguous(), down.contiguous(), weights.float().contiguous(), *places
    )


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        tokens, num_experts = logits.shape
        weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
        chosen = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
        block, padded = route_block(num_experts)
        kernel.experts_fwd_route[(triton.cdiv(tokens, block),)](
            logits, weights, chosen, tokens, num_experts, logits.stride(0),
            K=top_k, BT=block, BE=padded, BK=triton.next_power_of_2(top_k),
        )  # fmt: skip
        ctx.mark_non_differentiable(chosen)
        ctx.save_for_backward(weights, chosen)
        ctx.num_experts = num_experts
        return weights, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        weights, chosen = ctx.saved_tensors
        tokens, top_k = weights.shape
        block, padded = route_block(ctx.num_experts)
        out = torch.empty((tokens, ctx.num_experts), dtype=torch.float32, device=grad.device)
        kernel.experts_bwd_route[(triton.cdiv(tokens, block),)](
            weights, chosen, grad.contiguous(), out, tokens, ctx.num_experts,
            K=top_k, BT=block, BE=padded,
        )  # fmt: skip
        return out, None


def route_block(num_experts: int) -> tuple[int, int]:
    """Tokens and experts that one program holds."""
    padded = _padded(num_experts)
    return min(max(1024 // padded, 1), 64), padded


def route_triton(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Same numbers as the torch form of `router.route`; arguments checked there."""
    return _Route.apply(_rows(logits), top_k)
