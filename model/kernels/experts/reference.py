"""The definition of the expert layer: every token through each of its experts, one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def experts_reference(
    x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """sum_k weights[t, k] * down_e (silu(gate_e x_t) * up_e x_t), e = chosen[t, k].

    Args:
        x: [T, C]; gate_up: [E, 2F, C], gate first; down: [E, C, F].
        chosen: [T, K] int64; weights: [T, K].
    """
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for k in range(chosen.shape[1]):
            expert = int(chosen[t, k])
            gate, up = (gate_up[expert] @ x[t]).chunk(2)
            out[t] += weights[t, k] * (down[expert] @ (F.silu(gate) * up))
    return out
