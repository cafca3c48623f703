"""Triton kernels of the norms of a block, started by `launch.py`.

A tile holds BT whole rows of C channels; sums and statistics are fp32. With x the normed row, r its
1 / sqrt(mean(x^2) + eps), w the weight and g the gradient of x * r * w:

    dx = r (g w - x r * mean(g w * x r)),    dw = sum over rows of g * x r

The sum over rows is made in two steps, without atomics, so that it is the same every time: each
program walks its share of the rows and leaves one row of partial sums.
"""

import triton
import triton.language as tl


@triton.jit
def _cast(x, p_like):
    return x.to(p_like.dtype.element_ty)


@triton.jit
def _load(p_x, o_x, m_x):
    return tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def _norm_grad(b_gw, b_gwn, b_normed, b_rstd, C: tl.constexpr):
    """Gradient of x from g w, g w x r and x r."""
    along = tl.sum(b_gwn, axis=1) / C
    return b_rstd[:, None] * b_gw - b_normed * (b_rstd * along)[:, None]


@triton.jit(do_not_specialize=["T"])
def norm_fwd_join(
    p_residual, p_branch, p_w, p_x, p_out, p_rstd,
    s_residual, s_branch,
    T, eps, alpha, beta,
    C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
    HAS_BRANCH: tl.constexpr, KEEPS_X: tl.constexpr,
):  # fmt: skip
    """x = alpha * residual + beta * branch, and its norm."""
    b_t = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    b_c = tl.arange(0, BC)[None, :]
    o_t, m_x = b_t[:, None], (b_t < T)[:, None] & (b_c < C)
    b_x = _load(p_residual, o_t * s_residual + b_c, m_x)
    if HAS_BRANCH:
        b_x = alpha * b_x + beta * _load(p_branch, o_t * s_branch + b_c, m_x)
    if KEEPS_X:
        # what is carried on is rounded, and the norm is that of what is carried on
        b_x = _cast(b_x, p_x)
        tl.store(p_x + o_t * C + b_c, b_x, mask=m_x)
        b_x = b_x.to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / C + eps)
    tl.store(p_rstd + b_t, b_rstd, mask=b_t < T)
    b_w = _load(p_w, b_c, b_c < C)
    tl.store(p_out + o_t * C + b_c, _cast(b_x * b_rstd[:, None] * b_w, p_out), mask=m_x)


@triton.jit(do_not_specialize=["T"])
def norm_bwd_join(
    p_dout, p_dcarried, p_residual, p_branch, p_w, p_rstd, p_dresidual, p_dbranch, p_partial,
    s_dout, s_dcarried, s_residual, s_branch,
    T, alpha, beta,
    C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_CARRIED: tl.constexpr, POSTNORM: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr, HAS_DBRANCH: tl.constexpr, HAS_DW: tl.constexpr,
):  # fmt: skip
    """Gradients of residual, branch and weight; without a branch, residual is x itself."""
    b_c = tl.arange(0, BC)[None, :]
    b_w = _load(p_w, b_c, b_c < C)
    b_dw = tl.zeros((1, BC), tl.float32)
    for i in tl.range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0), num_stages=STAGES):
        b_t = i * BT + tl.arange(0, BT).to(tl.int64)
        o_t, m_x = b_t[:, None], (b_t < T)[:, None] & (b_c < C)
        b_x = _load(p_residual, o_t * s_residual + b_c, m_x)
        if HAS_BRANCH:
            b_x = alpha * b_x + beta * _load(p_branch, o_t * s_branch + b_c, m_x)
        b_g = _load(p_dout, o_t * s_dout + b_c, m_x)
        if HAS_CARRIED:
            b_carried = _load(p_dcarried, o_t * s_dcarried + b_c, m_x)
            if POSTNORM:
                b_g += b_carried
        b_rstd = tl.load(p_rstd + b_t, mask=b_t < T, other=0.0)
        b_normed = b_x * b_rstd[:, None]
        b_gn = b_g * b_normed
        if HAS_DW:
            b_dw += tl.sum(b_gn, axis=0)[None, :]
        b_dx = _norm_grad(b_g * b_w, b_gn * b_w, b_normed, b_rstd, C)
        if HAS_CARRIED:
            if not POSTNORM:
                b_dx += b_carried
        o_dx = o_t * C + b_c
        if HAS_DRESIDUAL:
            tl.store(p_dresidual + o_dx, _cast(alpha * b_dx, p_dresidual), mask=m_x)
        if HAS_DBRANCH:
            tl.store(p_dbranch + o_dx, _cast(beta * b_dx, p_dbranch), mask=m_x)
    if HAS_DW:
        o_p = tl.program_id(0).to(tl.int64) * C
        tl.store(p_partial + o_p + b_c, b_dw, mask=b_c < C)


@triton.jit(do_not_specialize=["T"])
def norm_fwd_gate(
    p_x, p_gate, p_w, p_out, p_rstd,
    s_x, s_gate,
    T, eps,
    C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """sigmoid(gate) * norm(x)."""
    b_t = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    b_c = tl.arange(0, BC)[None, :]
    o_t, m_x = b_t[:, None], (b_t < T)[:, None] & (b_c < C)
    b_x = _load(p_x, o_t * s_x + b_c, m_x)
    b_gate = _load(p_gate, o_t * s_gate + b_c, m_x)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / C + eps)
    tl.store(p_rstd + b_t, b_rstd, mask=b_t < T)
    b_out = tl.sigmoid(b_gate) * (b_x * b_rstd[:, None] * _load(p_w, b_c, b_c < C))
    tl.store(p_out + o_t * C + b_c, _cast(b_out, p_out), mask=m_x)


@triton.jit(do_not_specialize=["T"])
def norm_bwd_gate(
    p_dout, p_x, p_gate, p_w, p_rstd, p_dx, p_dgate, p_partial,
    s_dout, s_x, s_gate,
    T,
    C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
    HAS_DW: tl.constexpr,
):  # fmt: skip
    """Gradients of x, gate and weight."""
    b_c = tl.arange(0, BC)[None, :]
    b_w = _load(p_w, b_c, b_c < C)
    b_dw = tl.zeros((1, BC), tl.float32)
    for i in tl.range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0), num_stages=STAGES):
        b_t = i * BT + tl.arange(0, BT).to(tl.int64)
        o_t, m_x = b_t[:, None], (b_t < T)[:, None] & (b_c < C)
        b_x = _load(p_x, o_t * s_x + b_c, m_x)
        b_dout = _load(p_dout, o_t * s_dout + b_c, m_x)
        b_open = tl.sigmoid(_load(p_gate, o_t * s_gate + b_c, m_x))
        b_rstd = tl.load(p_rstd + b_t, mask=b_t < T, other=0.0)
        b_normed = b_x * b_rstd[:, None]
        b_g = b_dout * b_open
        b_gn = b_g * b_normed
        if HAS_DW:
            b_dw += tl.sum(b_gn, axis=0)[None, :]
        b_gwn = b_gn * b_w
        o_dx = o_t * C + b_c
        tl.store(p_dgate + o_dx, _cast(b_gwn - b_gwn * b_open, p_dgate), mask=m_x)
        b_dx = _norm_grad(b_g * b_w, b_gwn, b_normed, b_rstd, C)
        tl.store(p_dx + o_dx, _cast(b_dx, p_dx), mask=m_x)
    if HAS_DW:
        o_p = tl.program_id(0).to(tl.int64) * C
        tl.store(p_partial + o_p + b_c, b_dw, mask=b_c < C)
