"""The expert layer: tokens sorted by expert, one matmul an expert, no padding.

    y_t = sum_k p_{t,k} W2_e (silu(g) * u),   [g | u] = W1_e x_t,   e = chosen[t, k]

One autograd function holds all experts: backward needs [g | u] only, writes both halves of its
gradient in place, and gets the gradient of p from that of silu(g) * u, so that no expert's output
is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.linear.op import product, weight_grad


def expert_layer(
    x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of each token's experts (SwiGLU).

    Args:
        x: [T, C]; gate_up: [E, 2F, C], gate first; down: [E, C, F].
        chosen: [T, K] int64, E where the place is dropped; weights: [T, K] in any dtype.

    Returns: [T, C] in the dtype of x.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> x = torch.ones(1, 2)
        >>> expert_layer(x, torch.ones(1, 2, 2), torch.ones(1, 2, 1),
        ...              torch.tensor([[0]]), torch.ones(1, 1)).shape
        torch.Size([1, 2])
    """
    num_experts, twice, size = gate_up.shape
    if x.shape[1] != size or down.shape != (num_experts, size, twice // 2):
        raise ValueError(
            f"x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}: "
            "expected [T, C], [E, 2F, C], [E, C, F]"
        )
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=num_experts + 1).tolist()[:num_experts]
    order = order[: sum(counts)]
    token = order // chosen.shape[1]
    scale = weights.flatten().index_select(0, order)[:, None].to(x.dtype)
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        out = _Experts.apply(x.to(low), gate_up.to(low), down.to(low), scale.to(low), token, counts)
        return out.to(x.dtype)
    return _Experts.apply(x, gate_up, down, scale, token, counts)


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
        rows = x.index_select(0, token)
        inner, outer = [], []
        for expert, own in enumerate(rows.split(counts)):
            inner.append(product(own, gate_up[expert]))
            gate, up = inner[-1].chunk(2, dim=-1)
            outer.append(product(F.silu(gate).mul_(up), down[expert]))
        ctx.save_for_backward(rows, torch.cat(inner), gate_up, down, scale, token)
        ctx.counts = counts
        return torch.zeros_like(x).index_add_(0, token, torch.cat(outer).mul_(scale))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, gate_up, down, scale, token = ctx.saved_tensors
        needs_x, needs_gate_up, needs_down, needs_scale = ctx.needs_input_grad[:4]
        grads = grad.index_select(0, token)
        to_rows = torch.empty_like(rows) if needs_x else None
        to_gate_up = torch.empty_like(gate_up) if needs_gate_up else None
        to_down = torch.empty_like(down) if needs_down else None
        to_scale = torch.empty_like(scale) if needs_scale else None
        start = 0
        for expert, length in enumerate(ctx.counts):
            own = slice(start, start + length)
            start += length
            gate, up = inner[own].chunk(2, dim=-1)
            active = F.silu(gate)
            joined = active * up
            back = product(grads[own], down[expert].t())
            if to_scale is not None:
                to_scale[own] = (back * joined).sum(-1, keepdim=True)
            if to_down is not None:
                to_down[expert] = weight_grad(grads[own], joined.mul_(scale[own]))
            back = back.mul_(scale[own])
            slope = torch.empty_like(inner[own])
            torch.mul(back, active, out=slope[:, up.shape[1] :])
            slope[:, : up.shape[1]] = torch.ops.aten.silu_backward(back.mul_(up), gate)
            if to_gate_up is not None:
                to_gate_up[expert] = weight_grad(slope, rows[own])
            if to_rows is not None:
                to_rows[own] = product(slope, gate_up[expert].t())
        to_x = None
        if to_rows is not None:
            to_x = torch.zeros_like(grad).index_add_(0, token, to_rows)
        return to_x, to_gate_up, to_down, to_scale, None, None
