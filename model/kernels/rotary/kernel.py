"""Triton kernel of rotary positions: q and k in one launch, the angles in fp32.

Backward is the same kernel with the angle's sign turned: a rotation's transpose is its inverse.
"""

import triton
import triton.language as tl


@triton.jit
def _rotate(
    p_x, p_y, p_cos, p_sin, b_t, b_h, m_r,
    s_t, s_h, s_cos, heads,
    D: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = R // 2
    b_d = tl.arange(0, BH)[None, :]
    m_half = m_r & (b_d < HALF)
    o_cos = b_t * s_cos + b_d
    b_cos = tl.load(p_cos + o_cos, mask=m_half, other=0.0)
    b_sin = tl.load(p_sin + o_cos, mask=m_half, other=0.0)
    if INVERSE:
        b_sin = -b_sin
    p_x += b_t * s_t + b_h * s_h
    p_y += (b_t * heads + b_h) * D
    b_first = tl.load(p_x + b_d, mask=m_half, other=0.0).to(tl.float32)
    b_second = tl.load(p_x + HALF + b_d, mask=m_half, other=0.0).to(tl.float32)
    b_y = (b_first * b_cos - b_second * b_sin).to(p_y.dtype.element_ty)
    tl.store(p_y + b_d, b_y, mask=m_half)
    b_y = (b_second * b_cos + b_first * b_sin).to(p_y.dtype.element_ty)
    tl.store(p_y + HALF + b_d, b_y, mask=m_half)
    if R < D:
        b_d = R + tl.arange(0, BP)[None, :]
        m_pass = m_r & (b_d < D)
        tl.store(p_y + b_d, tl.load(p_x + b_d, mask=m_pass, other=0.0), mask=m_pass)


@triton.jit(do_not_specialize=["T"])
def rotary_fwd_pair(
    p_q, p_k, p_q_out, p_k_out, p_cos, p_sin,
    s_q_t, s_q_h, s_k_t, s_k_h, s_cos,
    T,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BH: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """BR rows, each one head of one token; the first programs have q, the others k."""
    i_r = tl.program_id(0).to(tl.int64)
    q_programs = tl.cdiv(T.to(tl.int64) * H, BR)
    if i_r < q_programs:
        b_r = (i_r * BR + tl.arange(0, BR))[:, None]
        _rotate(
            p_q, p_q_out, p_cos, p_sin, b_r // H, b_r % H, b_r // H < T, s_q_t, s_q_h, s_cos, H,
            D, R, BH, BP, INVERSE,
        )  # fmt: skip
    else:
        b_r = ((i_r - q_programs) * BR + tl.arange(0, BR))[:, None]
        _rotate(
            p_k, p_k_out, p_cos, p_sin, b_r // G, b_r % G, b_r // G < T, s_k_t, s_k_h, s_cos, G,
            D, R, BH, BP, INVERSE,
        )  # fmt: skip
