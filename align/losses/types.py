"""What a loss returns: sums that travel. Means are made once, over the global count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """One microbatch's share of a loss.

    Args:
        sum: scalar, fp32 or fp64, with a gradient: the sum over whatever the course counts (tokens,
            pairs).
        aux: scalar: the model's own loss on its routing, a mean over this microbatch's tokens,
            coefficients applied; None for a model without experts.
        metrics: name -> (sum, count), detached scalars; the loop divides after reducing both.
        maxima: name -> detached scalar; the loop keeps the largest.
        ledger: [N] fp64, sums of `align.ledger.entries`; None where no engine sampled.
    """

    sum: Tensor
    aux: Tensor | None = None
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)
    ledger: Tensor | None = None
