"""Triton kernels of the expert layer for few tokens, started by `launch.py`: a decode step.

What counts is that each chosen expert's weights are read once, by enough programs to fill the
device, and that there are few launches: sort, [g | u] with SwiGLU, down. Weights may be int8 with
one scale an output channel, multiplied behind the sum.
"""

import triton
import triton.language as tl

from model.kernels.experts.kernel import _locate


@triton.jit(do_not_specialize=["P", "E"])
def experts_few_sort(
    p_chosen, p_position, p_place, p_ends, P, E, BP: tl.constexpr, BE: tl.constexpr
):
    """As `experts_count` and `experts_place`, by one program."""
    b_p, b_e = tl.arange(0, BP), tl.arange(0, BE)
    m_p = b_p < P
    b_chosen = tl.load(p_chosen + b_p, mask=m_p, other=-1)
    b_is = (b_chosen[:, None] == b_e[None, :]).to(tl.int32)
    b_ends = tl.cumsum(tl.sum(b_is, axis=0), 0)
    b_first = b_ends - tl.sum(b_is, axis=0)
    b_row = tl.sum(b_is * (tl.cumsum(b_is, axis=0) - 1 + b_first[None, :]), axis=1)
    m_kept = m_p & (b_chosen >= 0) & (b_chosen < E)
    tl.store(p_position + b_p, tl.where(m_kept, b_row, -1), mask=m_p)
    tl.store(p_place + b_row, b_p, mask=m_kept)
    tl.store(p_ends + b_e, b_ends, mask=b_e < E)


@triton.jit(do_not_specialize=["E"])
def experts_few_inner(
    p_x, p_w, p_scale, p_ends, p_place, p_joined,
    E, s_x, C, F,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr,
    HAS_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """silu(g) * u of BM rows and BN columns: [T, C] x [E, 2F, C] -> [rows, F]."""
    expert, row, end = _locate(p_ends, tl.program_id(1), E, BM, BE)
    if row < end:
        b_m, b_n = row + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
        m_m, m_n = b_m < end, b_n < F
        token = tl.load(p_place + b_m, mask=m_m, other=0) // K
        p_a = p_x + token.to(tl.int64)[:, None] * s_x
        o_n = (expert.to(tl.int64) * 2 * F + b_n).to(tl.int64)
        p_g = p_w + o_n[None, :] * C
        p_u = p_g + F.to(tl.int64) * C
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for start in range(0, C, BK):
            b_k = start + tl.arange(0, BK)
            m_k = b_k < C
            m_w = m_k[:, None] & m_n[None, :]
            b_a = tl.load(p_a + b_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_g = tl.load(p_g + b_k[:, None], mask=m_w, other=0)
            b_u = tl.load(p_u + b_k[:, None], mask=m_w, other=0)
            gate = tl.dot(b_a, b_g.to(b_a.dtype), gate, input_precision=PRECISION)
            up = tl.dot(b_a, b_u.to(b_a.dtype), up, input_precision=PRECISION)
        if HAS_SCALE:
            gate *= tl.load(p_scale + o_n, mask=m_n, other=0.0)[None, :]
            up *= tl.load(p_scale + o_n + F, mask=m_n, other=0.0)[None, :]
        # rounded as `experts_fwd_swiglu` finds them
        gate = gate.to(p_joined.dtype.element_ty).to(tl.float32)
        up = up.to(p_joined.dtype.element_ty).to(tl.float32)
        joined = gate * tl.sigmoid(gate) * up
        p_o = p_joined + b_m.to(tl.int64)[:, None] * F + b_n[None, :]
        tl.store(p_o, joined.to(p_joined.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["E"])
def experts_few_outer(
    p_rows, p_w, p_scale, p_ends, p_out,
    E, C, F,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr,
    HAS_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[rows, F] x [E, C, F] -> [rows, C], BM rows and BN columns."""
    expert, row, end = _locate(p_ends, tl.program_id(1), E, BM, BE)
    if row < end:
        b_m, b_n = row + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
        m_m, m_n = b_m < end, b_n < C
        p_a = p_rows + b_m.to(tl.int64)[:, None] * F
        o_n = (expert.to(tl.int64) * C + b_n).to(tl.int64)
        p_b = p_w + o_n[None, :] * F
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, F, BK):
            b_k = start + tl.arange(0, BK)
            m_k = b_k < F
            b_a = tl.load(p_a + b_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_b = tl.load(p_b + b_k[:, None], mask=m_k[:, None] & m_n[None, :], other=0)
            acc = tl.dot(b_a, b_b.to(b_a.dtype), acc, input_precision=PRECISION)
        if HAS_SCALE:
            acc *= tl.load(p_scale + o_n, mask=m_n, other=0.0)[None, :]
        p_o = p_out + b_m.to(tl.int64)[:, None] * C + b_n[None, :]
        tl.store(p_o, acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
