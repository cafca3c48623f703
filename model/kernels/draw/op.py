"""A token of each row of logits by inverse transform sampling: the entry.

    u = hash(seed, sample, position) in [0, 1)
    token = the first i with cumsum(p)_i > u * cumsum(p)_V

Torch on any device; on CUDA one Triton program a row, which hashes, sums and looks up at once.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from model.kernels.draw.splitmix import uniform

Form = Literal["auto", "torch"]


def at_temperature(logits: Tensor, temperature: Tensor, *, tempered: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, V] at temperature 1 and at each row's own, which is 1 where it is 0."""
    untouched = logits.log_softmax(-1)
    if not tempered:
        return untouched, untouched
    own = torch.where(temperature > 0, temperature, 1.0)
    return untouched, (logits / own[:, None]).log_softmax(-1)


def pick(probabilities: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row at u of its mass, and the mass: [N, V], [N] fp64 -> [N] int64, fp64."""
    # fp64: in fp32 a cumulative sum over a large vocabulary would lose its rare tokens
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    mass = cumulative[:, -1]
    # the clamp keeps u * mass, when rounded up, below the last kept token's border
    point = (u * mass).minimum(mass.nextafter(0 * mass))
    tokens = torch.searchsorted(cumulative, point[:, None], right=True)[:, 0]
    # nan alone is beyond the end
    return tokens.clamp(max=probabilities.shape[-1] - 1), mass


def draw_tokens(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    sample: Tensor,
    position: Tensor,
    *,
    greedy: bool,
    tempered: bool,
    form: Form = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row of the whole vocabulary.

    Args:
        logits: [N, V] fp32 or fp64.
        temperature: [N] fp32; 0 takes the most likely token.
        seed, sample, position: [N] int64, what a row's random number is the hash of.
        greedy: whether any row has temperature 0.
        tempered: whether any row has a temperature other than 0 and 1.
        form: `auto` takes Triton on CUDA for fp32.

    Returns: tokens [N] int64; their log-probabilities at temperature 1, and at the row's own, 0
        where it is 0, [N] in the dtype of the logits. Both are nan where a row has no finite
        distribution.

    Example:
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> logits = torch.tensor([[0.0, 9.0]])
        >>> draw_tokens(logits, torch.zeros(1), *3 * [zero], greedy=True, tempered=False)[0]
        tensor([1])
    """
    if form == "auto" and logits.is_cuda and logits.dtype == torch.float32:
        # not at the top: torch for CPU comes without triton
        from model.kernels.draw.launch import draw_triton

        return draw_triton(
            logits, temperature, seed, sample, position, greedy=greedy, tempered=tempered
        )
    untouched, own = at_temperature(logits, temperature, tempered=tempered)
    tokens, _ = pick(own.exp(), uniform(seed, sample, position))
    drawn = own.gather(-1, tokens[:, None])[:, 0]
    if greedy:
        is_greedy = temperature == 0
        tokens = torch.where(is_greedy, logits.argmax(-1), tokens)
        drawn = torch.where(is_greedy, 0.0, drawn)
    return tokens, untouched.gather(-1, tokens[:, None])[:, 0], drawn
