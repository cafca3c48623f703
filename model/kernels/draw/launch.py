"""The launch of a draw: a program a row, which reads it from the cache of the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from model.kernels.draw import kernel
from model.kernels.draw.splitmix import INCREMENT, MULTIPLIERS

# without a sign
HASH = {
    name: number & ((1 << 64) - 1)
    for name, number in (
        ("INCREMENT", INCREMENT),
        ("FIRST", MULTIPLIERS[0][1]),
        ("SECOND", MULTIPLIERS[1][1]),
    )
}
# as measured on one H200
BLOCK_TOKENS = 4096
WARPS = 16


def draw_triton(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    sample: Tensor,
    position: Tensor,
    *,
    greedy: bool,
    tempered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same laws as the torch form of `op.draw_tokens`; arguments as there."""
    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    block = min(BLOCK_TOKENS, triton.next_power_of_2(vocabulary))
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    drawn = torch.empty_like(logprobs)
    numbers = (x.contiguous() for x in (temperature, seed, sample, position))
    kernel.draw_rows[(rows,)](
        logits, *numbers, tokens, logprobs, drawn,
        logits.stride(0), vocabulary,
        BV=block, BN=triton.next_power_of_2(triton.cdiv(vocabulary, block)),
        TEMPERED=tempered, GREEDY=greedy, num_warps=WARPS, **HASH,
    )  # fmt: skip
    return tokens, logprobs, drawn
