"""Packed causal attention by right-padded batches, for every device and dtype.

Sequences of like length are laid in one batch: under the causal mask the padding lies behind every
real query, so no mask is needed and no document sees another. How far a sequence is padded follows
from its own length alone, so that on a CPU its bits do not depend on its company.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Sequences up to here are padded, to one of four lengths between two powers of two; longer ones are
# work enough for a call each.
_PADDED_TOKENS = 256


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, window: int | None = None
) -> Tensor:
    """`packed_attention` with arguments that fit."""
    if len(lengths) == 1 and _room(lengths[0]) == lengths[0]:
        return _causal(q[None], k[None], v[None], window)[0]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    outputs, rows = [], []
    for room, members in _alike(lengths):
        size = torch.tensor([lengths[m] for m in members])[:, None]
        index = torch.arange(room)[None, :]
        real = index < size
        # a padded place reads its sequence's first token; what it yields is left out below
        take = (starts[list(members)][:, None] + index * real).to(q.device)
        real = real.to(q.device)
        outputs.append(_causal(q[take], k[take], v[take], window)[real])
        rows.append(take[real])
    if len(outputs) == 1 and list(lengths) == sorted(lengths, reverse=True):
        return outputs[0]
    order = torch.cat(rows)
    return torch.zeros_like(q).index_copy(0, order, torch.cat(outputs))


def _alike(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Padded lengths, falling, and the sequences of each in order of falling length."""
    batches: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        batches.setdefault(_room(lengths[index]), []).append(index)
    return list(batches.items())


def _room(length: int) -> int:
    """What a sequence of that length is padded to: 8, 16, .. 64, 80, .. 128, 160, .. 256."""
    if length > _PADDED_TOKENS:
        return length
    step = max(8, 1 << ((length - 1).bit_length() - 3)) if length > 8 else 8
    return -(-length // step) * step


def _causal(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """[B, L, heads, D] each -> [B, L, H, D]."""
    length = q.shape[1]
    mask = None
    if window is not None and window < length:
        index = torch.arange(length, device=q.device)
        behind = index[:, None] - index[None, :]
        mask = (behind >= 0) & (behind < window)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
