"""Launches of the expert layer for few tokens; no gradient. Shapes depend on their number only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from model.kernels.experts.launch import combine
from model.kernels.experts_few import kernel

# places (tokens times experts a token) that one program sorts
MAX_PLACES = 1024


@dataclass(frozen=True)
class Shape:
    """Tiles of the two products: rows, columns and depth, of which the columns differ."""

    rows: int
    inner_columns: int
    outer_columns: int
    depth: int
    warps: int
    stages: int


def choose_shape(places: int, num_experts: int, dtype: torch.dtype) -> Shape:
    """Few rows an expert: the weights' bytes count, and narrow tiles make many programs."""
    if dtype == torch.float32:
        return Shape(16, 32, 32, 32, 4, 2)
    if places <= 8 * num_experts:
        return Shape(16, 32, 32, 128, 4, 5)
    if places <= 16 * num_experts:
        return Shape(16, 64, 32, 128, 4, 3)
    return Shape(64, 64, 64, 64, 4, 4)


def expert_layer_few(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    chosen: Tensor,
    weights: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    shape: Shape | None = None,
) -> Tensor:
    """Same numbers as `experts.op.expert_layer` of the same arguments, of at most MAX_PLACES.

    Args:
        gate_up, down: dense; int8 with scales.
        scales: [E, 2F] and [E, C] fp32, of int8 weights' output channels.
    """
    tokens, size = x.shape
    num_experts, inner = len(gate_up), gate_up.shape[1] // 2
    places, device = chosen.numel(), x.device
    x = x if x.stride(1) == 1 else x.contiguous()
    padded = max(triton.next_power_of_2(num_experts), 2)
    position, place, ends = (
        torch.empty(n, dtype=torch.int32, device=device) for n in (places, places, num_experts)
    )
    kernel.experts_few_sort[(1,)](
        chosen, position, place, ends, places, num_experts,
        BP=max(triton.next_power_of_2(places), 2), BE=padded, num_warps=8,
    )  # fmt: skip
    tile = shape or choose_shape(places, num_experts, x.dtype)
    # every expert may leave one tile part empty
    tiles = triton.cdiv(places, tile.rows) + min(num_experts, places)
    joined = torch.empty((places, inner), dtype=x.dtype, device=device)
    rows = torch.empty((places, size), dtype=x.dtype, device=device)
    options = {
        "BM": tile.rows, "BK": tile.depth, "BE": padded, "HAS_SCALE": scales is not None,
        "PRECISION": "ieee", "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    inner_scale, outer_scale = scales or (ends, ends)
    kernel.experts_few_inner[triton.cdiv(inner, tile.inner_columns), tiles](
        x, gate_up, inner_scale, ends, place, joined, num_experts, x.stride(0), size, inner,
        K=chosen.shape[1], BN=tile.inner_columns, **options,
    )  # fmt: skip
    kernel.experts_few_outer[triton.cdiv(size, tile.outer_columns), tiles](
        joined, down, outer_scale, ends, rows, num_experts, size, inner,
        BN=tile.outer_columns, **options,
    )  # fmt: skip
    return combine(rows, position, weights.float(), tokens)
