"""The definition: the whole [T, V] softmax in fp32."""

from __future__ import annotations

from torch import Tensor


def token_logprobs_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies as in `token_logprobs`, each [T]."""
    logprobs = (hidden @ weight.t() / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy
