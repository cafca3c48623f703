"""RMSNorm: statistics in fp32 (fp64 stays), scaled in the dtype of the activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        size: channels normalised together.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # statistics and product are made in fp32 inside, whatever the dtype of x
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
