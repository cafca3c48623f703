"""Softmax attention over a row that is cut over the ranks of the sequence axis.

Layers trade tokens for heads by an all-to-all, so that each rank sees the whole row with a
share of the heads: exact for packed documents, balanced under the causal mask although the parts
are contiguous, and run by whatever kernel runs on one rank. Where the heads do not divide, a long
document goes round a ring (`ring.py`); for short ones and windows, keys and values are gathered,
and each rank attends from its own tokens.

Bytes to a rank, forward, of T tokens on R ranks, in units of T D 2 / R: heads for tokens (2 H +
2 G), each rank of work 1 / R; ring (2 H + 2 G) for the zig-zag and 2 G (R - 1) round, work 1 / R;
gathered 2 G (R - 1), but the last rank works (2 R - 1) / R times its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from model.kernels.attention.op import (
    merge_attention,
    packed_attention,
    packed_attention_backward,
    packed_attention_lse,
)
from model.parallel.collectives import exchange, gather_parts
from model.parallel.mesh import Axis
from model.parallel.ring import attend_by_ring
from model.parallel.sequence import ShardLengths

# Tokens of a document from which balanced work is worth the way to the zig-zag and back. On paper
# the two are even at 6,000 on two ranks (600 TFLOP/s, 200 GB/s); not measured yet.
RING_TOKENS = 16_384


@dataclass(frozen=True)
class SoftmaxShare:
    """Attention over a row that is cut over ranks; takes the place of a softmax layer's core."""

    axis: Axis

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, window: int | None = None
    ) -> Tensor:
        """As `packed_attention`, on this rank's part of q, k, v: [T', H, D]."""
        if not isinstance(lengths, ShardLengths) or not lengths.crosses:
            return packed_attention(q, k, v, lengths, window=window)
        if trades_heads(q.shape[1], k.shape[1], self.axis.size):
            return attend_by_heads(q, k, v, lengths, axis=self.axis, window=window)
        if window is None and longest_across(lengths) >= RING_TOKENS:
            return attend_by_ring(q, k, v, lengths, axis=self.axis)
        return attend_by_keys(q, k, v, lengths, axis=self.axis, window=window)


def longest_across(lengths: ShardLengths) -> int:
    """Tokens of the longest document that lies on more than one rank.

    Example:
        >>> longest_across(ShardLengths((12, 2, 8), rank=0, size=2))
        12
        >>> longest_across(ShardLengths((4, 4), rank=0, size=2))
        0
    """
    borders = [0, *accumulate(lengths.row)]
    return max(
        (
            end - start
            for start, end in pairwise(borders)
            if any(start < cut < end for cut in lengths.ends)
        ),
        default=0,
    )


def trades_heads(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether every rank can have a share of the heads with the key heads that belong to them."""
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def attend_by_heads(
    q: Tensor, k: Tensor, v: Tensor, lengths: ShardLengths, *, axis: Axis, window: int | None
) -> Tensor:
    """Each rank attends over the whole row with its share of the heads (all-to-all and back)."""
    size, own = axis.size, q.shape[0]
    if size > k.shape[1]:
        # a key head goes to every rank that has one of its query heads
        k, v = (x.repeat_interleave(size // x.shape[1], dim=1) for x in (k, v))
    # [T', heads, D] -> [ranks, T', heads / ranks, D], by receiver
    shares = torch.cat([x.unflatten(1, (size, -1)) for x in (q, k, v)], dim=2).transpose(0, 1)
    row = exchange(shares.flatten(0, 1), [own] * size, lengths.sizes, axis)
    kv = k.shape[1] // size
    q, k, v = row.split([q.shape[1] // size, kv, kv], dim=1)
    out = packed_attention(q, k, v, lengths.row, window=window)
    back = exchange(out, lengths.sizes, [own] * size, axis)
    return back.unflatten(0, (size, own)).transpose(0, 1).flatten(1, 2)


def attend_by_keys(
    q: Tensor, k: Tensor, v: Tensor, lengths: ShardLengths, *, axis: Axis, window: int | None
) -> Tensor:
    """Each rank attends from its own tokens to the gathered keys of their documents."""
    kv = gather_parts(torch.cat([k, v], dim=1), lengths.sizes, axis)
    start, past = lengths.start, lengths.before[lengths.rank]
    if window is not None:
        past = min(past, window - 1)
    keys, values = kv[start - past : start + q.shape[0]].split(k.shape[1], dim=1)
    if not past:
        return packed_attention(q, keys, values, lengths, window=window)
    own = slice(past, None)
    if window is not None:
        # of the tokens here, only the first window - 1 see keys of the parts before
        local = packed_attention(q, keys[own], values[own], lengths, window=window)
        rows = min(lengths[0], window - 1)
        seen = slice(past + rows)
        return torch.cat([_attend_window(q[:rows], keys[seen], values[seen], window), local[rows:]])
    first = lengths[0]
    seen, rest = slice(past + first), slice(past + first, None)
    out = _AttendAfter.apply(q[:first], keys[seen], values[seen])
    if len(lengths) == 1:
        return out
    return torch.cat([out, packed_attention(q[first:], keys[rest], values[rest], lengths[1:])])


def _attend_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The last tokens [n, H, D] of a document, n < window, to its last keys [past + n, G, D]."""
    place = torch.arange(k.shape[0], device=q.device)
    behind = place[-q.shape[0] :, None] - place[None, :]
    mask = (behind >= 0) & (behind < window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out[0].transpose(0, 1)


class _AttendAfter(torch.autograd.Function):
    """The last tokens [n, H, D] of a document, to all its keys [past + n, G, D].

    The keys of before, which all tokens see, and those of the tokens themselves, under the causal
    mask, are attended to apart and merged by their log-sum-exp: no mask of both is ever made.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past, own = k.shape[0] - q.shape[0], [q.shape[0]]
        out, lse = packed_attention_lse(q, k[:past], v[:past], own, key_lengths=[past])
        out, lse = merge_attention(out, lse, *packed_attention_lse(q, k[past:], v[past:], own))
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        past, own = k.shape[0] - q.shape[0], [q.shape[0]]
        before = packed_attention_backward(
            grad, q, k[:past], v[:past], out, lse, own, key_lengths=[past]
        )
        after = packed_attention_backward(grad, q, k[past:], v[past:], out, lse, own)
        to_k, to_v = (torch.cat(pair) for pair in zip(before[1:], after[1:], strict=True))
        return before[0] + after[0], to_k, to_v
