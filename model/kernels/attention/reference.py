"""The definition of packed causal attention: every sequence on its own, softmax in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v under the causal mask, head h reading key head h // (H / G).

    Args:
        q: [T, H, D]; k, v: [T, G, D] with H a multiple of G.
        lengths: tokens of each sequence, sum T.
        window: tokens that a query sees, itself included; None sees all.

    Returns: [T, H, D] in the dtype of q.
    """
    outputs, start = [], 0
    group = q.shape[1] // k.shape[1]
    for length in lengths:
        one = slice(start, start + length)
        keys, values = (x[one].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[one], keys) / q.shape[-1] ** 0.5
        index = torch.arange(length, device=q.device)
        behind = index[:, None] - index[None, :]
        seen = (behind >= 0) & (behind < (window or length))
        scores = scores.masked_fill(~seen, float("-inf"))
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, values))
        start += length
    return torch.cat(outputs)
