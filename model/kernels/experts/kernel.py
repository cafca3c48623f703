"""Triton kernels of the expert layer, started by `launch.py`.

Places are the T * K pairs (token, k-th choice), flat index t * K + k. Rows are the places sorted by
expert, so that each expert's lie together: `ends` [E] says where they end, `position` gives a
place's row (-1: dropped), `place` a row's place. Only the device knows how many rows there are;
what lies after the last is never read. No kernel is compiled anew for another number of tokens.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "E"])
def experts_fwd_route(
    p_logits, p_weights, p_chosen,
    T, E, s_logits,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The K greatest logits of each token and their softmax."""
    b_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    b_e, b_k = tl.arange(0, BE), tl.arange(0, BK)
    m_t = b_t < T
    b_left = tl.load(
        p_logits + b_t[:, None] * s_logits + b_e[None, :],
        mask=m_t[:, None] & (b_e < E)[None, :], other=0.0,
    )  # fmt: skip
    # not a number counts as the greatest, as in torch, so that it shows
    b_left = tl.where(b_left != b_left, float("inf"), b_left)
    b_left = tl.where((b_e < E)[None, :], b_left, float("-inf"))
    b_best = tl.full((BT, BK), float("-inf"), tl.float32)
    for k in tl.static_range(K):
        b_max, b_arg = tl.max(b_left, axis=1, return_indices=True)
        b_best = tl.where((b_k == k)[None, :], b_max[:, None], b_best)
        b_left = tl.where(b_e[None, :] == b_arg[:, None], float("-inf"), b_left)
        tl.store(p_chosen + b_t * K + k, b_arg.to(tl.int64), mask=m_t)
    b_w = tl.exp(b_best - tl.max(b_best, axis=1)[:, None])
    b_w = b_w / tl.sum(b_w, axis=1)[:, None]
    m_w = m_t[:, None] & (b_k < K)[None, :]
    tl.store(p_weights + b_t[:, None] * K + b_k[None, :], b_w, mask=m_w)


@triton.jit(do_not_specialize=["T", "E"])
def experts_bwd_route(
    p_weights, p_chosen, p_dweights, p_dlogits,
    T, E,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dl = w_k (dw_k - sum_j w_j dw_j) at each chosen expert, 0 elsewhere."""
    b_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    b_e = tl.arange(0, BE)
    m_t = b_t < T
    b_mean = tl.zeros((BT,), tl.float32)
    for k in tl.static_range(K):
        b_w = tl.load(p_weights + b_t * K + k, mask=m_t, other=0.0)
        b_mean += b_w * tl.load(p_dweights + b_t * K + k, mask=m_t, other=0.0)
    b_dl = tl.zeros((BT, BE), tl.float32)
    for k in tl.static_range(K):
        b_w = tl.load(p_weights + b_t * K + k, mask=m_t, other=0.0)
        b_dw = tl.load(p_dweights + b_t * K + k, mask=m_t, other=0.0)
        b_arg = tl.load(p_chosen + b_t * K + k, mask=m_t, other=0)
        b_dl = tl.where(b_e[None, :] == b_arg[:, None], (b_w * (b_dw - b_mean))[:, None], b_dl)
    m_e = m_t[:, None] & (b_e < E)[None, :]
    tl.store(p_dlogits + b_t[:, None] * E + b_e[None, :], b_dl, mask=m_e)


@triton.jit(do_not_specialize=["P", "E", "N"])
def experts_count(p_chosen, p_counts, P, E, N, BP: tl.constexpr, BE: tl.constexpr):
    """[E, N]: how many of each block's places chose each expert."""
    i_b = tl.program_id(0)
    b_p = i_b.to(tl.int64) * BP + tl.arange(0, BP)
    b_e = tl.arange(0, BE)
    b_chosen = tl.load(p_chosen + b_p, mask=b_p < P, other=-1)
    b_is = (b_chosen[:, None] == b_e[None, :]).to(tl.int32)
    tl.store(p_counts + b_e.to(tl.int64) * N + i_b, tl.sum(b_is, axis=0), mask=b_e < E)


@triton.jit(do_not_specialize=["P", "E", "N"])
def experts_place(
    p_chosen, p_counts, p_sums, p_position, p_place,
    P, E, N,
    BP: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Each place's row: after its expert's in earlier blocks, in the order of the places."""
    i_b = tl.program_id(0)
    b_p = i_b.to(tl.int64) * BP + tl.arange(0, BP)
    b_e = tl.arange(0, BE)
    m_p = b_p < P
    b_chosen = tl.load(p_chosen + b_p, mask=m_p, other=-1)
    b_is = (b_chosen[:, None] == b_e[None, :]).to(tl.int32)
    o_e = b_e.to(tl.int64) * N + i_b
    b_first = tl.load(p_sums + o_e, mask=b_e < E, other=0)
    b_first -= tl.load(p_counts + o_e, mask=b_e < E, other=0)
    b_row = tl.sum(b_is * (tl.cumsum(b_is, axis=0) - 1 + b_first[None, :]), axis=1)
    m_kept = m_p & (b_chosen >= 0) & (b_chosen < E)
    tl.store(p_position + b_p, tl.where(m_kept, b_row, -1), mask=m_p)
    tl.store(p_place + b_row, b_p.to(tl.int32), mask=m_kept)


@triton.jit
def experts_spread(p_x, p_position, p_rows, C, s_x, K: tl.constexpr, BC: tl.constexpr):
    """Copies a token to its rows."""
    i_t = tl.program_id(0).to(tl.int64)
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = b_c < C
    b_x = tl.load(p_x + i_t * s_x + b_c, mask=m_c)
    for k in tl.static_range(K):
        row = tl.load(p_position + i_t * K + k).to(tl.int64)
        tl.store(p_rows + row * C + b_c, b_x, mask=b_c < tl.where(row >= 0, C, 0))


@triton.jit
def experts_combine(
    p_rows, p_position, p_weights, p_out,
    C,
    K: tl.constexpr, BC: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Sums a token's rows, weighted or not, in fp32 and in the order of k."""
    i_t = tl.program_id(0).to(tl.int64)
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = b_c < C
    acc = tl.zeros((BC,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(p_position + i_t * K + k).to(tl.int64)
        m_row = b_c < tl.where(row >= 0, C, 0)
        b_row = tl.load(p_rows + row * C + b_c, mask=m_row, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            b_row = b_row * tl.load(p_weights + i_t * K + k)
        acc += b_row
    tl.store(p_out + i_t * C + b_c, acc.to(p_out.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["E"])
def experts_fwd_swiglu(p_inner, p_joined, p_ends, F, E, BF: tl.constexpr):
    """silu(g) * u of one row's columns."""
    i_r = tl.program_id(0).to(tl.int64)
    if i_r < tl.load(p_ends + E - 1):
        b_f = tl.program_id(1) * BF + tl.arange(0, BF)
        m_f = b_f < F
        b_g = tl.load(p_inner + i_r * 2 * F + b_f, mask=m_f, other=0.0).to(tl.float32)
        b_u = tl.load(p_inner + i_r * 2 * F + F + b_f, mask=m_f, other=0.0).to(tl.float32)
        b_joined = b_g * tl.sigmoid(b_g) * b_u
        tl.store(p_joined + i_r * F + b_f, b_joined.to(p_joined.dtype.element_ty), mask=m_f)


@triton.jit(do_not_specialize=["E"])
def experts_bwd_swiglu(
    p_inner, p_back, p_weights, p_place, p_ends, p_dinner, p_dweights,
    F, E,
    BF: tl.constexpr,
):  # fmt: skip
    """One row: gradients of [g | u] and of its weight; `back` becomes weight * silu(g) * u.

    `back` comes as the gradient of the expert's output, not yet weighted, times W2.
    """
    i_r = tl.program_id(0).to(tl.int64)
    if i_r < tl.load(p_ends + E - 1):
        place = tl.load(p_place + i_r)
        weight = tl.load(p_weights + place)
        acc = tl.zeros((BF,), tl.float32)
        for start in range(0, F, BF):
            b_f = start + tl.arange(0, BF)
            m_f = b_f < F
            b_g = tl.load(p_inner + i_r * 2 * F + b_f, mask=m_f, other=0.0).to(tl.float32)
            b_u = tl.load(p_inner + i_r * 2 * F + F + b_f, mask=m_f, other=0.0).to(tl.float32)
            b_d = tl.load(p_back + i_r * F + b_f, mask=m_f, other=0.0).to(tl.float32)
            b_s = tl.sigmoid(b_g)
            b_active = b_g * b_s
            b_joined = b_active * b_u
            acc += b_d * b_joined
            b_d = b_d * weight
            b_dg = b_d * b_u * b_s * (1.0 + b_g * (1.0 - b_s))
            dtype = p_back.dtype.element_ty
            tl.store(p_dinner + i_r * 2 * F + b_f, b_dg.to(dtype), mask=m_f)
            tl.store(p_dinner + i_r * 2 * F + F + b_f, (b_d * b_active).to(dtype), mask=m_f)
            tl.store(p_back + i_r * F + b_f, (b_joined * weight).to(dtype), mask=m_f)
        tl.store(p_dweights + place, tl.sum(acc, axis=0))


@triton.jit
def _locate(p_ends, i_m, E, BM: tl.constexpr, BE: tl.constexpr):
    """Expert, first row and the expert's end of the i_m-th tile of BM rows; no expert: end 0."""
    b_e = tl.arange(0, BE)
    b_end = tl.load(p_ends + b_e, mask=b_e < E, other=0)
    b_start = tl.load(p_ends + b_e - 1, mask=(b_e > 0) & (b_e < E), other=0)
    b_tiles = (b_end - b_start + BM - 1) // BM
    expert = tl.sum((tl.cumsum(b_tiles, 0) <= i_m).to(tl.int32), 0)
    first = tl.sum(tl.where(b_e < expert, b_tiles, 0), 0)
    row = tl.sum(tl.where(b_e == expert, b_start, 0), 0) + (i_m - first) * BM
    return expert, row, tl.sum(tl.where(b_e == expert, b_end, 0), 0)


@triton.jit
def _tile(
    p_ends, num_tiles, E, N_OUT,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """This program's tile: as `_locate`, and its first column.

    Neighbours in time share columns of the weight, GROUP tiles of rows at once.
    """
    i_p = tl.program_id(0)
    span = GROUP * tl.cdiv(N_OUT, BN)
    first = i_p // span * GROUP
    height = tl.minimum(num_tiles - first, GROUP)
    expert, row, end = _locate(p_ends, first + i_p % span % height, E, BM, BE)
    return expert, row, end, i_p % span // height * BN


@triton.jit(do_not_specialize=["num_tiles", "E"])
def experts_product(
    p_rows, p_w, p_ends, p_out,
    num_tiles, E, N_OUT, N_IN,
    s_w_e, s_w_out, s_w_in,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows times their expert's matrix: [rows, in] x [E, out, in] -> [rows, out], any strides."""
    expert, row, end, column = _tile(p_ends, num_tiles, E, N_OUT, BM, BN, BE, GROUP)
    if row < end:
        b_m, b_n = row + tl.arange(0, BM), column + tl.arange(0, BN)
        m_m, m_n = b_m < end, b_n < N_OUT
        p_a = p_rows + b_m.to(tl.int64)[:, None] * N_IN
        p_b = p_w + expert.to(tl.int64) * s_w_e + b_n.to(tl.int64)[None, :] * s_w_out
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, N_IN, BK):
            b_k = start + tl.arange(0, BK)
            m_k = b_k < N_IN
            b_a = tl.load(p_a + b_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            o_b = b_k.to(tl.int64)[:, None] * s_w_in
            b_b = tl.load(p_b + o_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
            acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)
        p_o = p_out + b_m.to(tl.int64)[:, None] * N_OUT + b_n[None, :]
        tl.store(p_o, acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def experts_weight_grad(
    p_grad, p_rows, p_ends, p_out,
    N_OUT, N_IN,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad^T rows over each expert's rows: [rows, out], [rows, in] -> [E, out, in]."""
    i_e = tl.program_id(2).to(tl.int64)
    b_m = tl.program_id(1) * BM + tl.arange(0, BM)
    b_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_m, m_n = b_m < N_OUT, b_n < N_IN
    begin = tl.load(p_ends + i_e - 1, mask=i_e > 0, other=0)
    end = tl.load(p_ends + i_e)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(begin, end, BK):
        b_k = start + tl.arange(0, BK)
        m_k = b_k < end
        o_k = b_k.to(tl.int64)[:, None]
        b_a = tl.load(p_grad + o_k * N_OUT + b_m, mask=m_k[:, None] & m_m[None, :], other=0.0)
        b_b = tl.load(p_rows + o_k * N_IN + b_n, mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(tl.trans(b_a), b_b, acc, input_precision=PRECISION)
    p_o = p_out + (i_e * N_OUT + b_m.to(tl.int64)[:, None]) * N_IN + b_n[None, :]
    tl.store(p_o, acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
