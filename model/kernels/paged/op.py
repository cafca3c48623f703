"""Attention of one new token a sequence to keys and values in pages: the entry.

Torch on any device, C on a CPU where it was built, Triton on CUDA (`launch.py`), where nothing
waits for the device and every shape is fixed, so that it can be captured in a graph.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cpu import passes

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TRITON_SIZE = 256

Form = Literal["auto", "torch"]


def paged_attention(
    q: Tensor,
    pages: Tensor,
    table: Tensor,
    index: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    form: Form = "auto",
) -> Tensor:
    """What each sequence's last token sees.

    Args:
        q: [S, H, D], bf16, fp16, fp32 or fp64.
        pages: [2, N, Z, G, D], keys and values, N pages of Z tokens, H a multiple of G.
        table: [M, P] int32 or int64, page numbers in order; past a sequence's end of any value.
        index: [S] int64, row of each sequence in the table.
        lengths: [S] int64, tokens of each sequence, >= 1, the new one included.
        window: tokens that a query sees, itself included; None sees all.
        form: `auto` takes Triton on CUDA and C on a CPU, and torch for fp64 and for D > 256.

    Returns: [S, H, D] in the dtype of q; scaled by 1 / sqrt(D).

    Raises:
        ValueError: if shapes or devices do not fit.

    Example:
        >>> pages = torch.ones(2, 1, 4, 1, 2)
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> paged_attention(torch.ones(1, 2, 2), pages, zero[None], zero, zero + 3).shape
        torch.Size([1, 2, 2])
    """
    _check(q, pages, table, index, lengths)
    if form == "auto" and q.is_cuda and q.dtype in TRITON_DTYPES and q.shape[2] <= MAX_TRITON_SIZE:
        # not at the top: torch for CPU comes without triton
        from model.kernels.paged.launch import paged_triton

        return paged_triton(q, pages, table, index, lengths, window=window)
    return _paged(q, pages, table, index, lengths, window, form)


def _check(q: Tensor, pages: Tensor, table: Tensor, index: Tensor, lengths: Tensor) -> None:
    fits = q.ndim == 3 and pages.ndim == 5 and table.ndim == 2 and len(pages) == 2
    if not fits or pages.shape[4] != q.shape[2] or q.shape[1] % pages.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, pages {tuple(pages.shape)}, table {tuple(table.shape)}: expected "
            "[S, H, D], [2, N, Z, G, D] with H a multiple of G, [M, P]"
        )
    if index.shape != q.shape[:1] or lengths.shape != q.shape[:1]:
        raise ValueError(
            f"index {tuple(index.shape)}, lengths {tuple(lengths.shape)}: expected [{len(q)}] each"
        )
    if not q.device == pages.device == table.device == index.device == lengths.device:
        raise ValueError(
            f"q on {q.device}, pages on {pages.device}, table on {table.device}, index on "
            f"{index.device}, lengths on {lengths.device}: expected one device"
        )


def _paged(
    q: Tensor,
    pages: Tensor,
    table: Tensor,
    index: Tensor,
    lengths: Tensor,
    window: int | None,
    form: Form,
) -> Tensor:
    """In C, or each sequence by a call of its own: a batched product's bits depend on the batch."""
    size = pages.shape[2]
    counts = lengths if window is None else lengths.clamp(max=window)
    ends = counts.cumsum(0)
    of = torch.arange(len(q), device=q.device).repeat_interleave(counts)
    place = torch.arange(len(of), device=q.device) - (ends - lengths)[of]
    rows = table[index[of], place // size].long() * size + place % size
    keys, values = (store.flatten(0, 1).index_select(0, rows).to(q.dtype) for store in pages)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if form == "auto" and passes.takes(q) and q.shape[2] <= passes.MAX_SIZE:
        q = q if q.stride(2) == 1 else q.contiguous()
        given = {"q": q, "k": keys, "v": values, "out": out}
        passes.attention("attention_one", given, None, counts.tolist())
        return out
    of_each = (x.split(counts.tolist()) for x in (keys, values))
    for n, (k, v) in enumerate(zip(*of_each, strict=True)):
        # [H, D] -> [H, 1, D]; [M, G, D] -> [G, M, D]
        each = q[n, :, None], k.transpose(0, 1), v.transpose(0, 1)
        out[n] = F.scaled_dot_product_attention(*each, enable_gqa=True)[:, 0]
    return out
