"""Triton kernels of attention to pages, started by `launch.py`.

One program reads a share of one sequence's tokens for all query heads of one key/value head and
leaves its softmax sum (log2) and weighted mean; a second kernel merges the shares.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["Z"])
def paged_share(
    p_q, p_keys, p_values, p_table, p_index, p_lengths, p_out, p_lse,
    s_q_t, s_q_h, s_table,
    Z, window, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BH: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, SHARES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of H / G heads of one sequence to tokens of one share."""
    i_s, i_g, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot = tl.load(p_index + i_s).to(tl.int64)
    length = tl.load(p_lengths + i_s).to(tl.int32)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    span = tl.cdiv(tl.cdiv(length - first, BN), SHARES) * BN
    begin = first + i_p * span
    end = tl.minimum(begin + span, length)
    b_h, b_d = tl.arange(0, BH), tl.arange(0, BD)
    heads = i_g * (H // G) + b_h
    m_h, m_d = b_h < H // G, b_d < D
    b_q = tl.load(
        p_q + i_s * s_q_t + heads[:, None] * s_q_h + b_d[None, :],
        mask=m_h[:, None] & m_d[None, :], other=0.0,
    )  # fmt: skip
    b_max = tl.full((BH,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BH,), tl.float32)
    acc = tl.zeros((BH, BD), tl.float32)
    for start in range(begin, end, BN):
        b_n = start + tl.arange(0, BN)
        m_n = b_n < end
        page = tl.load(p_table + slot * s_table + b_n // Z, mask=m_n, other=0).to(tl.int64)
        o_n = ((page * Z + b_n % Z) * G + i_g) * D
        b_k = tl.load(
            p_keys + o_n[None, :] + b_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0
        )
        b_v = tl.load(
            p_values + o_n[:, None] + b_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0
        )
        scores = tl.dot(b_q, b_k, input_precision=PRECISION) * (scale * LOG2_E)
        scores = tl.where(m_n[None, :], scores, float("-inf"))
        # a block holds at least one token, so the maximum is finite
        new_max = tl.maximum(b_max, tl.max(scores, axis=1))
        fade = tl.exp2(b_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        b_sum = b_sum * fade + tl.sum(weights, axis=1)
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
        b_max = new_max
    # an empty share: sum 0, maximum -inf
    acc = acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    b_lse = tl.where(b_sum > 0, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), float("-inf"))
    row = (i_s * H + heads) * SHARES + i_p
    tl.store(p_lse + row, b_lse, mask=m_h)
    tl.store(p_out + row[:, None] * D + b_d[None, :], acc, mask=m_h[:, None] & m_d[None, :])


@triton.jit
def paged_merge(p_shares, p_lse, p_merged, D: tl.constexpr, BD: tl.constexpr, SHARES: tl.constexpr):
    """The shares of one head of one sequence, weighted by their sums; share 0 is never empty."""
    i_r = tl.program_id(0).to(tl.int64)
    b_p, b_d = tl.arange(0, SHARES), tl.arange(0, BD)
    b_lse = tl.load(p_lse + i_r * SHARES + b_p)
    b_w = tl.exp2(b_lse - tl.max(b_lse, axis=0))
    b_w = b_w / tl.sum(b_w, axis=0)
    o_x = (i_r * SHARES + b_p[:, None]) * D + b_d[None, :]
    b_x = tl.load(p_shares + o_x, mask=(b_d < D)[None, :], other=0.0)
    b_o = tl.sum(b_x * b_w[:, None], axis=0)
    tl.store(p_merged + i_r * D + b_d, b_o.to(p_merged.dtype.element_ty), mask=b_d < D)
