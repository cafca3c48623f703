"""Triton kernel of the lightning layer's activation; its forward is torch's own silu.

Backward reads what attention gives back for q, k and v, and writes one gradient interleaved by
head:  dx = dy * s (1 + x (1 - s)), s = sigmoid(x).
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def qkv_bwd_silu(
    p_dq, p_dk, p_dv, p_x, p_dx,
    s_dq_t, s_dq_h, s_dk_t, s_dk_h, s_dv_t, s_dv_h,
    s_x_t,
    rows,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BR rows of one head of one token each."""
    b_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    b_d = tl.arange(0, BD)[None, :]
    m_x = (b_r < rows)[:, None] & (b_d < D)
    b_t, b_h = (b_r // H)[:, None], (b_r % H)[:, None]
    o_x = b_t * s_x_t + b_h * (3 * D) + b_d
    o_dx = b_r[:, None] * (3 * D) + b_d
    for part in tl.static_range(3):
        if part == 0:
            p_dy = p_dq + b_t * s_dq_t + b_h * s_dq_h
        elif part == 1:
            p_dy = p_dk + b_t * s_dk_t + b_h * s_dk_h
        else:
            p_dy = p_dv + b_t * s_dv_t + b_h * s_dv_h
        b_dy = tl.load(p_dy + b_d, mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + o_x + part * D, mask=m_x, other=0.0).to(tl.float32)
        b_s = tl.sigmoid(b_x)
        b_dx = b_dy * b_s * (1.0 + b_x * (1.0 - b_s))
        tl.store(p_dx + o_dx + part * D, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
