"""The expert layer: tokens sorted by expert, one matmul an expert, no padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    counts = torch.bincount(chosen.flatten(), minlength=num_experts + 1).tolist()
    kept = sum(counts[:num_experts])
    order = order[:kept]
    token = order // chosen.shape[1]
    outputs = []
    for expert, rows in enumerate(x.index_select(0, token).split(counts[:num_experts])):
        gate, up = F.linear(rows, gate_up[expert]).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, down[expert]))
    scale = weights.flatten().index_select(0, order)[:, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, torch.cat(outputs) * scale)
