"""The definitions of the norms of a block, as the formulas stand."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def join_norm_reference(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    gain: tuple[float, float] = (1.0, 1.0),
    postnorm: bool = True,
) -> tuple[Tensor, Tensor]:
    """x = alpha * residual + beta * branch; gives what is carried on (the norm or x), and the norm.

    Source: MiniMax-01 report, section 4.2.
    """
    alpha, beta = gain
    x = residual if branch is None else alpha * residual + beta * branch
    normed = norm_reference(x, weight, eps)
    return normed if postnorm else x, normed


def gated_norm_reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """sigmoid(gate) * norm(x): [T, H * D], one norm over all heads."""
    return torch.sigmoid(gate) * norm_reference(x, weight, eps)
