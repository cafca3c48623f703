"""Next-token loss: the weighted sum of -log p(token). Pretraining and SFT differ in weights."""

from __future__ import annotations

from torch import Tensor

from align.losses.types import Loss


def lm_loss(logprobs: Tensor, weights: Tensor, *, aux: Tensor | None = None) -> Loss:
    """Weighted negative log-likelihood, summed over tokens.

    Args:
        logprobs: [T] fp32, log-probability of each target.
        weights: [T] fp32, >= 0; 0 leaves a token out. Their sum over all processes and
            microbatches is the denominator.
        aux: the model's own routing loss, handed on.

    Example:
        >>> import torch
        >>> lm_loss(torch.tensor([-1.0, -2.0]), torch.tensor([0.0, 1.0])).sum.item()
        2.0
    """
    # `where` and not a bare product: a logprob of -inf on an untrained token must not give NaN.
    nll = -(logprobs.where(weights != 0, 0.0) * weights).sum()
    return Loss(sum=nll, aux=aux, metrics={"nll": (nll.detach(), weights.sum())})
