"""Launch of the draw from whole rows of logits."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from model.kernels.draw import kernel

BLOCK_WORDS = 4096
WARPS = 8


def draw_triton(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    sample: Tensor,
    position: Tensor,
    *,
    is_tempered: bool,
    has_greedy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row of the whole distribution.

    Args:
        logits: [N, V] fp32.
        temperature: [N] fp32; 0 takes the greatest. Read only where asked for.
        seed, sample, position: [N] int64, dense: the row's random number is their hash.
        is_tempered: whether any temperature is neither 0 nor 1.
        has_greedy: whether any temperature is 0.

    Returns: tokens [N] int64; logprobs at temperature 1 and under the distribution drawn from (0
        where greedy), [N] fp32 each, nan for a row without a finite distribution.
    """
    count, words = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    logprobs, tempered = (
        torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    kernel.draw_row[(count,)](
        logits, temperature, seed, sample, position, tokens, logprobs, tempered,
        logits.stride(0), words,
        BV=min(triton.next_power_of_2(words), BLOCK_WORDS),
        IS_TEMPERED=is_tempered, HAS_GREEDY=has_greedy, num_warps=WARPS,
    )  # fmt: skip
    return tokens, logprobs, tempered
