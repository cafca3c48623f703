"""Launches of attention to pages; shapes depend on the number of sequences only."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from model.kernels.paged import kernel

# programs wanted on a device, and bounds of the shares of a sequence: at least MIN_SHARES, so that
# one long sequence among many does not keep the others waiting
PROGRAMS = 1024
MIN_SHARES, MAX_SHARES = 4, 64
BLOCK_TOKENS = 64
# the least rows of a matrix product
MIN_HEADS = 16


def num_shares(sequences: int, kv_heads: int) -> int:
    """Shares that the tokens of each sequence are cut into, a power of two."""
    wanted = triton.next_power_of_2(max(1, PROGRAMS // (sequences * kv_heads)))
    return min(max(wanted, MIN_SHARES), MAX_SHARES)


def paged_triton(
    q: Tensor,
    pages: Tensor,
    table: Tensor,
    index: Tensor,
    lengths: Tensor,
    *,
    window: int | None,
) -> Tensor:
    """Same numbers as the torch form of `op.paged_attention`; arguments checked there."""
    count, heads, size = q.shape
    kv_heads = pages.shape[3]
    q = q if q.stride(2) == 1 else q.contiguous()
    shares = num_shares(count, kv_heads)
    parts = torch.empty((count, heads, shares, size), dtype=torch.float32, device=q.device)
    lse = torch.empty((count, heads, shares), dtype=torch.float32, device=q.device)
    padded = max(triton.next_power_of_2(size), 16)
    is_wide = pages.dtype == torch.float32
    kernel.paged_share[count, kv_heads, shares](
        q.to(pages.dtype), pages[0], pages[1], table, index, lengths, parts, lse,
        q.stride(0), q.stride(1), table.stride(0),
        pages.shape[2], window or 0, size**-0.5,
        H=heads, G=kv_heads, D=size,
        BH=max(triton.next_power_of_2(heads // kv_heads), MIN_HEADS), BD=padded,
        BN=BLOCK_TOKENS // 2 if is_wide else BLOCK_TOKENS, SHARES=shares,
        HAS_WINDOW=window is not None, PRECISION="ieee" if is_wide else "tf32",
        num_warps=4, num_stages=2,
    )  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    kernel.paged_merge[(count * heads,)](
        parts, lse, out, D=size, BD=padded, SHARES=shares, num_warps=1
    )
    return out
