"""Device code of `launch.py`: a product of hidden and weight whose tile never leaves the chip.

Logits are in units of log 2 here: z = hidden W^T * scale with scale = log2(e) / temperature, so
that exp2 is the only exponential. A tile's sums are taken against the tile's own maximum.

Token counts differ from batch to batch: nothing is compiled anew for them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(i_p, num_m, num_n, GROUP: tl.constexpr):
    """Tile of program i_p: GROUP row tiles by all column tiles share what the L2 cache holds."""
    span = GROUP * num_n
    first = i_p // span * GROUP
    height = tl.minimum(num_m - first, GROUP)
    return first + i_p % span % height, i_p % span // height


@triton.jit
def _logits(
    d_hidden, d_weight, o_m, o_n, width, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    b_z = tl.zeros((BM, BN), tl.float32)
    for k in range(0, width, BK):
        b_z = tl.dot(d_hidden.load([o_m, k]), d_weight.load([o_n, k]).T, b_z)
    return b_z * scale


@triton.jit(do_not_specialize=["total", "width"])
def logprob_fwd_tiles(
    d_hidden, d_weight, p_targets, p_max, p_sum, p_slack, p_picked,
    total, vocabulary, width, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile's max m, sum 2^(z - m), sum 2^(z - m) (m - z), each [tiles, T], and z of targets."""
    num_n = tl.cdiv(vocabulary, BN)
    i_m, i_n = _place(tl.program_id(0), tl.cdiv(total, BM), num_n, GROUP)
    b_z = _logits(d_hidden, d_weight, i_m * BM, i_n * BN, width, scale, BM, BN, BK)
    b_m = i_m * BM + tl.arange(0, BM)
    b_n = i_n * BN + tl.arange(0, BN)
    m_m = b_m < total
    b_target = tl.load(p_targets + b_m, mask=m_m, other=-1)
    b_picked = tl.sum(tl.where(b_n[None, :] == b_target[:, None], b_z, 0.0), 1)
    m_here = m_m & (b_target // BN == i_n) & (b_target >= 0) & (b_target < vocabulary)
    tl.store(p_picked + b_m, b_picked, mask=m_here)
    b_z = tl.where((b_n < vocabulary)[None, :], b_z, float("-inf"))
    b_max = tl.max(b_z, 1)
    b_under = b_max[:, None] - b_z
    b_exp = tl.exp2(-b_under)
    o_out = i_n.to(tl.int64) * total + b_m
    tl.store(p_max + o_out, b_max, mask=m_m)
    tl.store(p_sum + o_out, tl.sum(b_exp, 1), mask=m_m)
    # 0 times inf outside the vocabulary
    b_slack = tl.where((b_n < vocabulary)[None, :], b_exp * b_under, 0.0)
    tl.store(p_slack + o_out, tl.sum(b_slack, 1), mask=m_m)


@triton.jit(do_not_specialize=["total", "num_n"])
def logprob_fwd_merge(
    p_max, p_sum, p_slack, p_picked, p_logprobs, p_entropy, p_normaliser,
    total, num_n,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tiles of one token to its logprob, entropy (nats) and log2 sum 2^z."""
    b_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = b_m < total
    b_max = tl.full((BM,), float("-inf"), tl.float32)
    for n in range(0, num_n, BN):
        b_n = n + tl.arange(0, BN)
        o_in = b_n.to(tl.int64)[:, None] * total + b_m[None, :]
        m_in = (b_n < num_n)[:, None] & m_m[None, :]
        b_tile = tl.load(p_max + o_in, mask=m_in, other=float("-inf"))
        b_max = tl.maximum(b_max, tl.max(b_tile, 0))
    b_max = tl.where(m_m, b_max, 0.0)
    b_sum = tl.zeros((BM,), tl.float32)
    b_slack = tl.zeros((BM,), tl.float32)
    for n in range(0, num_n, BN):
        b_n = n + tl.arange(0, BN)
        o_in = b_n.to(tl.int64)[:, None] * total + b_m[None, :]
        m_in = (b_n < num_n)[:, None] & m_m[None, :]
        # outside, the maximum itself with nothing under it: finite in all that follows
        b_under = b_max[None, :] - tl.load(p_max + o_in, mask=m_in, other=float("-inf"))
        b_under = tl.where(m_in, b_under, 0.0)
        b_part = tl.load(p_sum + o_in, mask=m_in, other=0.0)
        b_weight = tl.exp2(-b_under)
        b_sum += tl.sum(b_part * b_weight, 0)
        b_here = tl.load(p_slack + o_in, mask=m_in, other=0.0)
        b_slack += tl.sum(b_weight * (b_here + b_under * b_part), 0)
    LN2: tl.constexpr = 0.6931471805599453
    b_sum = tl.where(m_m, b_sum, 1.0)
    b_log = tl.log2(b_sum)
    b_picked = tl.load(p_picked + b_m, mask=m_m, other=0.0)
    tl.store(p_normaliser + b_m, b_max + b_log, mask=m_m)
    tl.store(p_logprobs + b_m, (b_picked - b_max - b_log) * LN2, mask=m_m)
    # both terms are >= 0: nothing cancels where the entropy is small
    tl.store(p_entropy + b_m, (b_log + b_slack / b_sum) * LN2, mask=m_m)


@triton.jit(do_not_specialize=["total", "width", "first"])
def logprob_bwd_slope(
    d_hidden, d_weight, p_targets, p_normaliser, p_grad, p_slope,
    total, vocabulary, width, first, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(1[v = target] - p_v) grad of one tile; `first` is the token of the weight's first row."""
    num_n = tl.cdiv(vocabulary, BN)
    i_m, i_n = _place(tl.program_id(0), tl.cdiv(total, BM), num_n, GROUP)
    b_z = _logits(d_hidden, d_weight, i_m * BM, i_n * BN, width, scale, BM, BN, BK)
    b_m = i_m * BM + tl.arange(0, BM)
    b_n = i_n * BN + tl.arange(0, BN)
    m_m = b_m < total
    b_target = tl.load(p_targets + b_m, mask=m_m, other=-1) - first
    b_norm = tl.load(p_normaliser + b_m, mask=m_m, other=0.0)
    b_grad = tl.load(p_grad + b_m, mask=m_m, other=0.0)
    b_slope = tl.where(b_n[None, :] == b_target[:, None], 1.0, 0.0) - tl.exp2(b_z - b_norm[:, None])
    b_slope = (b_slope * b_grad[:, None]).to(p_slope.dtype.element_ty)
    o_out = b_m.to(tl.int64)[:, None] * vocabulary + b_n[None, :]
    tl.store(p_slope + o_out, b_slope, mask=m_m[:, None] & (b_n < vocabulary)[None, :])
