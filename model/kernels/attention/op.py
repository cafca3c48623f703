"""Packed causal attention with grouped key/value heads, with and without a cache.

Without a cache, sequences of like length are laid in one right-padded batch: under the causal mask
the padding lies behind every real query, so no mask is needed and no document sees another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# A batch may hold this many times the tokens that it needs before it is split in two.
_WASTE = 1.3


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, window: int | None = None
) -> Tensor:
    """Causal attention inside each of the packed sequences.

    Args:
        q: [T, H, D]; k, v: [T, G, D], H a multiple of G.
        lengths: tokens of each sequence, >= 1, sum T.
        window: tokens that a query sees, itself included; None sees all.

    Returns: [T, H, D] in the dtype of q; scaled by 1 / sqrt(D).

    Raises:
        ValueError: if shapes do not fit or the lengths do not sum to T.

    Example:
        >>> q = torch.ones(3, 2, 4); k = torch.ones(3, 1, 4)
        >>> packed_attention(q, k, k, [2, 1]).shape
        torch.Size([3, 2, 4])
    """
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected q [T, H, D] "
            "and k, v alike [T, G, D] with H a multiple of G"
        )
    if sum(lengths) != q.shape[0] or min(lengths, default=1) < 1:
        raise ValueError(f"lengths {tuple(lengths)} must be >= 1 each and sum to T = {q.shape[0]}")
    if len(lengths) == 1:
        return _causal(q[None], k[None], v[None], window)[0]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    outputs, rows = [], []
    for members in _alike(lengths):
        longest = max(lengths[m] for m in members)
        size = torch.tensor([lengths[m] for m in members])[:, None]
        index = torch.arange(longest)[None, :]
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


def _alike(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Sequences by falling length, cut into batches that waste little."""
    batches: list[tuple[int, ...]] = []
    members: list[int] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[members[0]] if members else lengths[index]
        if members and longest * (len(members) + 1) > _WASTE * (used + lengths[index]):
            batches.append(tuple(members))
            members, used = [], 0
        members.append(index)
        used += lengths[index]
    return [*batches, tuple(members)]


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


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int],
    past: Tensor,
    *,
    window: int | None = None,
) -> Tensor:
    """Attention of new tokens to everything their sequences hold.

    Args:
        q: [T, H, D], new tokens, packed by `lengths`.
        keys, values: [S, M, G, D], the sequences' whole pasts with the new tokens in place;
            places behind a sequence's end may hold anything finite.
        past: [S] int64, tokens held before this call, on the device of q.

    Returns: [T, H, D].
    """
    longest = max(lengths)
    even = min(lengths) == longest
    if even:
        rows = None
        queries = q.view(len(lengths), longest, *q.shape[1:])
    else:
        rows = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)])
        rows = rows.to(q.device)
        queries = q.new_zeros(len(lengths) * longest, *q.shape[1:]).index_copy(0, rows, q)
        queries = queries.view(len(lengths), longest, *q.shape[1:])
    place = past[:, None] + torch.arange(longest, device=q.device)[None, :]
    key_place = torch.arange(keys.shape[1], device=q.device)
    behind = place[:, :, None] - key_place[None, None, :]
    mask = behind >= 0
    if window is not None:
        mask &= behind < window
    out = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask[:, None],
        enable_gqa=queries.shape[2] != keys.shape[2],
    ).transpose(1, 2)
    out = out.reshape(-1, *q.shape[1:])
    return out if rows is None else out.index_select(0, rows)
