"""The norms of the network: RMSNorm alone, of the residual stream, and with a gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.kernels.norm.op import gated_norm, join_norm, rms_norm


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
        """[.., C] -> [.., C] in the dtype of x."""
        return rms_norm(x, self.weight, self.eps)


class ResidualNorm(RMSNorm):
    """RMSNorm of the residual stream, after the branch before it, if any, has joined.

    Args:
        size, eps: as above.
        postnorm: whether the residual carries the norm on (PostNorm), or what it is made of.
        gain: alpha and beta of the join.
    """

    def __init__(
        self, size: int, eps: float, *, postnorm: bool, gain: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        super().__init__(size, eps)
        self.postnorm = postnorm
        self.gain = gain

    # without a branch there is nothing to join
    def forward(self, residual: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[T, C] each -> what the residual carries on, and the norm; both read only."""
        return join_norm(
            residual, branch, self.weight, self.eps, gain=self.gain, postnorm=self.postnorm
        )


class GatedRMSNorm(RMSNorm):
    """RMSNorm over all heads together, times sigmoid(gate)."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """[.., C] each -> [.., C]."""
        return gated_norm(x, gate, self.weight, self.eps)
