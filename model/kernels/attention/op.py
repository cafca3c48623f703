"""Packed causal attention with grouped key/value heads: the entries, which choose the form.

`packed_attention` is what a layer calls. `packed_attention_lse` and `packed_attention_backward` are
its two halves for whoever cuts the keys into pieces (ring attention, a prefix that a group of
answers shares): out and lse of two pieces merge into those of their union (`merge_attention`), and
the backward of a piece takes the merged ones and gives its exact share of every gradient:

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
    P_a = exp(s_a - lse),  dS_a = P_a (grad v_a^T - sum_d grad out),  dv_a = P_a^T grad
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.attention import pieces
from model.kernels.attention.padded import padded_attention


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, window: int | None = None
) -> Tensor:
    """Causal attention inside each of the packed sequences.

    Args:
        q: [T, H, D]; k, v: [T, G, D] of one dtype, H a multiple of G.
        lengths: tokens of each sequence, >= 1, sum T.
        window: tokens that a query sees, itself included, >= 1; None sees all.

    Returns: [T, H, D] in the dtype of q; scaled by 1 / sqrt(D).

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, the lengths do not sum to T, or the
            window is not positive.

    Example:
        >>> q = torch.ones(3, 2, 4); k = torch.ones(3, 1, 4)
        >>> packed_attention(q, k, k, [2, 1]).shape
        torch.Size([3, 2, 4])
    """
    _check(q, k, v, lengths, None, window)
    if pieces.is_fused(q):
        return _Attention.apply(q, k, v, tuple(lengths), None, window)[0]
    return padded_attention(q, k, v, lengths, window=window)


def packed_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    key_lengths: Sequence[int] | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of each query's scores.

    Args:
        q: [T, H, D]; k, v: [T_k, G, D] of one dtype, H a multiple of G.
        lengths: queries of each sequence, >= 1, sum T.
        key_lengths: keys of each sequence, >= 1, sum T_k, all of them seen by all its queries (keys
            from before the queries: another rank's, a prefix); None: as in `packed_attention`.
        window: as in `packed_attention`; not with key_lengths.

    Returns: out [T, H, D] in the dtype of q, with gradients; lse [T, H] fp32 (fp64 stays), of any
        strides, natural log, without gradient: whoever merges pieces calls
        `packed_attention_backward` with the merged out and lse.

    Raises:
        ValueError: as `packed_attention`; for key_lengths with a window; on CUDA for fp64 and for
            head sizes that are no multiple of 8 (fp32: 4) or above 256.

    Example:
        >>> q = torch.zeros(2, 1, 4); v = torch.ones(3, 1, 4)
        >>> packed_attention_lse(q, v, v, [2], key_lengths=[3])[1].exp().flatten().tolist()
        [3.0, 3.0]
    """
    _check(q, k, v, lengths, key_lengths, window)
    _check_lse(q)
    keys = None if key_lengths is None else tuple(key_lengths)
    return _Attention.apply(q, k, v, tuple(lengths), keys, window)


def packed_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    *,
    key_lengths: Sequence[int] | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a piece of attention, given out and lse over all the keys its queries see.

    Args:
        grad: [T, H, D], gradient of the merged out, in the dtype of q.
        q, k, v, lengths, key_lengths, window: as the piece's `packed_attention_lse` had them.
        out, lse: [T, H, D] in the dtype of q and [T, H] fp32, merged over all pieces.

    Returns: this piece's share of dq, and its dk and dv, in the dtype of q.

    Raises:
        ValueError: as `packed_attention_lse`, and if grad, out or lse do not fit.

    Example:
        >>> q = torch.zeros(2, 1, 4); v = torch.ones(3, 1, 4)
        >>> out, lse = packed_attention_lse(q, v, v, [2], key_lengths=[3])
        >>> grads = packed_attention_backward(out, q, v, v, out, lse, [2], key_lengths=[3])
        >>> [tuple(x.shape) for x in grads]
        [(2, 1, 4), (3, 1, 4), (3, 1, 4)]
    """
    _check(q, k, v, lengths, key_lengths, window)
    _check_lse(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    for name, x, shape, dtype in (
        ("grad", grad, q.shape, q.dtype),
        ("out", out, q.shape, q.dtype),
        ("lse", lse, q.shape[:2], wide),
    ):
        if x.shape != shape or x.dtype != dtype or x.device != q.device:
            raise ValueError(
                f"{name} {tuple(x.shape)} {x.dtype} on {x.device}: expected {tuple(shape)} {dtype} "
                f"on {q.device}"
            )
    with torch.no_grad():
        chosen = pieces.choose(q, lengths, key_lengths, window)
        return pieces.backward(grad, q, k, v, out, lse, chosen)


@torch.no_grad()
def merge_attention(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention to the union of two sets of keys, from attention to each; no gradient.

    Args:
        out, other_out: [T, H, D]; lse, other_lse: [T, H], -inf where no key was seen by one of the
            two.

    Returns: out in the dtype of the first (hold it in fp32 to merge many), and lse.

    Example:
        >>> out, lse = torch.ones(1, 1, 2), torch.zeros(1, 1)
        >>> merge_attention(out, lse, 3 * out, lse)[0].tolist()
        [[[2.0, 2.0]]]
    """
    total = torch.logaddexp(lse, other_lse)
    mine, others = (torch.exp(x - total)[..., None] for x in (lse, other_lse))
    return (mine * out + others * other_out).to(out.dtype), total


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        key_lengths: tuple[int, ...] | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.pieces = pieces.choose(q, lengths, key_lengths, window)
        out, lse = pieces.forward(q, k, v, ctx.pieces)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *pieces.backward(grad, q, k, v, out, lse, ctx.pieces), None, None, None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int] | None,
    window: int | None,
) -> None:
    tokens = q.shape[:1] if key_lengths is None else k.shape[:1]
    if (
        not q.ndim == k.ndim == 3
        or k.shape != v.shape
        or tokens != k.shape[:1]
        or q.shape[2] != k.shape[2]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected q [T, H, D] "
            "and k, v alike [T, G, D] with H a multiple of G"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: expected one dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"q on {q.device}, k on {k.device}, v on {v.device}: expected one device")
    _check_lengths("lengths", lengths, q.shape[0], "T")
    if key_lengths is not None:
        _check_lengths("key_lengths", key_lengths, k.shape[0], "the keys")
        if len(key_lengths) != len(lengths):
            raise ValueError(
                f"key_lengths {tuple(key_lengths)} and lengths {tuple(lengths)}: expected one of "
                "each a sequence"
            )
        if window is not None:
            raise ValueError(f"window = {window} with key_lengths: expected None")
    if window is not None and window < 1:
        raise ValueError(f"window = {window}, expected >= 1, or None to see all")


def _check_lengths(name: str, lengths: Sequence[int], total: int, what: str) -> None:
    if sum(lengths) != total or min(lengths, default=1) < 1:
        raise ValueError(f"{name} {tuple(lengths)} must be >= 1 each and sum to {what} = {total}")


def _check_lse(q: Tensor) -> None:
    if q.is_cuda and not pieces.is_fused(q):
        raise ValueError(
            f"q {q.dtype} with D = {q.shape[2]} on CUDA has no log-sum-exp: expected bf16 or fp16 "
            "with D a multiple of 8 up to 256, or fp32 with D a multiple of 4"
        )


def continued_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    held: Sequence[int],
) -> Tensor:
    """Causal attention of new tokens to each other and to all that came before; no gradient.

    Two calls without a mask, which no kernel for long rows takes, and their merge.

    Args:
        q: [T, H, D]; k, v: [T, G, D], the new tokens, packed by `lengths`.
        past: keys and values before them, packed by `held`, each [sum(held), G, D].
        held: tokens before, of each sequence, >= 0.

    Returns: [T, H, D].

    Example:
        >>> new, old = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
        >>> continued_attention(old, new, new, (old, old), [1], [1]).flatten().tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    keys, values = (x.to(q.dtype) for x in past)
    own, own_lse = packed_attention_lse(q, k, v, lengths)
    rows, total = [], 0
    for length, before in zip(lengths, held, strict=True):
        if before:
            rows.append(slice(total, total + length))
        total += length
    theirs, their_lse = packed_attention_lse(
        torch.cat([q[row] for row in rows]),
        keys,
        values,
        [row.stop - row.start for row in rows],
        key_lengths=[before for before in held if before],
    )
    out, begin = own.clone(), 0
    for row in rows:
        other = slice(begin, begin + row.stop - row.start)
        merged, _ = merge_attention(
            own[row].float() if q.dtype != torch.float64 else own[row],
            own_lse[row],
            theirs[other],
            their_lse[other],
        )
        out[row] = merged.to(q.dtype)
        begin = other.stop
    return out


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
