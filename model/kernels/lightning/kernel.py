"""Portable Triton kernels of lightning attention, laid out by `plan.py`, started by `launch.py`.

A pass runs a segment of chunks with its state on chip, forwards or backwards in time:

    forwards   o_i = sum_{j<=i} d^(i-j) (q_i . k_j) v_j + d^(i+1) q_i X
               X'  = d^n X + sum_j d^(n-1-j) k_j^T v_j
    backwards  o_i = sum_{j>=i} d^(j-i) (q_i . k_j) v_j + d^(n-1-i) q_i X
               X'  = d^n X + sum_j d^(j+1) k_j^T v_j

with d = exp(-slope), n tokens in the chunk and X the carry across the chunk's border. Every
gradient is such a pass: dq = forwards(do, v, k), dk = backwards(v, do, q) and
dv = backwards(k, q, do).
"""

import triton
import triton.language as tl

# What decayed to 2^-48 is 2^-24 of the last bit of an fp32 sum of terms of its own size, so keys
# this far from a border are not read for its carry.
DEAD_LOG2 = tl.constexpr(48.0)


@triton.jit
def _cast(x, p_like):
    return x.to(p_like.dtype.element_ty)


@triton.jit
def lightning_carry_pieces(
    p_k, p_v, p_slopes, p_pieces, p_out,
    s_k_t, s_k_h, s_v_t, s_v_h,
    H,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_j d^(distance of j to the border) k_j^T v_j over the tokens of one piece."""
    i_v, i_h, i_p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slope = tl.load(p_slopes + i_h) * 1.4426950408889634
    begin = tl.load(p_pieces + i_p * 3)
    end = tl.load(p_pieces + i_p * 3 + 1)
    border = tl.load(p_pieces + i_p * 3 + 2)
    # slope 0 never fades; the cap keeps the quotient inside int32
    reach = tl.minimum(DEAD_LOG2 / tl.maximum(slope, 1e-7), 2.0e9).to(tl.int64)
    if REVERSE:
        end = tl.minimum(end, border + reach).to(tl.int32)
    else:
        begin = tl.maximum(begin, border - reach).to(tl.int32)
    if begin < end:
        b_t = tl.arange(0, BT)
        b_k_d = tl.arange(0, BK)
        b_v_d = i_v * BV + tl.arange(0, BV)
        acc = tl.zeros((BK, BV), tl.float32)
        for start in range(begin, end, BT):
            rows = start + b_t
            m_t = rows < end
            o_t = rows.to(tl.int64)
            b_k = tl.load(
                p_k + i_h * s_k_h + o_t[:, None] * s_k_t + b_k_d[None, :],
                mask=m_t[:, None] & (b_k_d < DK)[None, :], other=0.0,
            )  # fmt: skip
            b_v = tl.load(
                p_v + i_h * s_v_h + o_t[:, None] * s_v_t + b_v_d[None, :],
                mask=m_t[:, None] & (b_v_d < DV)[None, :], other=0.0,
            )  # fmt: skip
            if REVERSE:
                distance = rows - border + 1
            else:
                distance = border - 1 - rows
            fade = tl.where(m_t, tl.exp2(-slope * distance.to(tl.float32)), 0.0)
            b_v = (b_v * fade[:, None]).to(b_v.dtype)
            acc = tl.dot(tl.trans(b_k), b_v, acc, input_precision=PRECISION)
        o_out = (i_p * H + i_h) * DK * DV + b_k_d[:, None] * DV + b_v_d[None, :]
        tl.store(p_out + o_out, acc, mask=(b_k_d < DK)[:, None] & (b_v_d < DV)[None, :])


@triton.jit
def lightning_carry_scan(
    p_pieces_out, p_init, p_out, p_slopes, p_pieces, p_carries,
    num_carries,
    s_init_row, s_init_col,
    H,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, HAS_INIT: tl.constexpr,
):  # fmt: skip
    """Carry at each border: the sum of its live pieces and what came through the segment."""
    i_b, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slope = tl.load(p_slopes + i_h) * 1.4426950408889634
    b_e = i_b * BLOCK + tl.arange(0, BLOCK)
    m_e = b_e < DK * DV
    carry = tl.zeros((BLOCK,), tl.float32)
    for i_c in range(num_carries):
        first = tl.load(p_carries + i_c * 5)
        last = tl.load(p_carries + i_c * 5 + 1)
        length = tl.load(p_carries + i_c * 5 + 2)
        through = tl.load(p_carries + i_c * 5 + 3)
        fade = tl.exp2(-slope * length.to(tl.float32))
        carry = tl.where(through != 0, carry * fade, 0.0)
        if HAS_INIT:
            if through == 0:
                seq = tl.load(p_carries + i_c * 5 + 4).to(tl.int64)
                o_e = (seq * H + i_h) * DK * DV + (b_e // DV) * s_init_row + (b_e % DV) * s_init_col
                carry = fade * tl.load(p_init + o_e, mask=m_e, other=0.0)
        for i_p in range(first, last):
            begin = tl.load(p_pieces + i_p * 3)
            end = tl.load(p_pieces + i_p * 3 + 1)
            border = tl.load(p_pieces + i_p * 3 + 2)
            reach = tl.minimum(DEAD_LOG2 / tl.maximum(slope, 1e-7), 2.0e9).to(tl.int64)
            if REVERSE:
                alive = begin < border + reach
            else:
                alive = end > border - reach
            # a dead piece was not written
            if alive:
                o_p = (i_p * H + i_h) * DK * DV + b_e
                carry += tl.load(p_pieces_out + o_p, mask=m_e, other=0.0)
        tl.store(p_out + (i_c * H + i_h) * DK * DV + b_e, carry, mask=m_e)


@triton.jit
def lightning_run(
    p_q, p_k, p_v, p_o, p_slopes, p_chunks, p_segments, p_carry, p_init, p_final,
    s_q_t, s_q_h, s_k_t, s_k_h, s_v_t, s_v_h, s_o_t, s_o_h,
    s_carry_row, s_carry_col, s_init_row, s_init_col, s_final_row, s_final_col,
    H,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    REVERSE: tl.constexpr, HAS_CARRY: tl.constexpr, HAS_INIT: tl.constexpr,
    HAS_FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass over one segment for one head and BV columns of v."""
    i_v, i_h, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slope = tl.load(p_slopes + i_h) * 1.4426950408889634
    low = tl.load(p_segments + i_s * 5)
    high = tl.load(p_segments + i_s * 5 + 1)
    row = tl.load(p_segments + i_s * 5 + 2).to(tl.int64)
    enters = tl.load(p_segments + i_s * 5 + 3).to(tl.int64)
    leaves = tl.load(p_segments + i_s * 5 + 4).to(tl.int64)

    b_t = tl.arange(0, BT)
    b_k_d = tl.arange(0, BK)
    b_v_d = i_v * BV + tl.arange(0, BV)
    m_k_d = (b_k_d < DK)[None, :]
    m_v_d = (b_v_d < DV)[None, :]
    m_state = (b_k_d < DK)[None, :] & (b_v_d < DV)[:, None]
    state = tl.zeros((BV, BK), tl.float32)
    if HAS_CARRY:
        if row >= 0:
            o_row = (row * H + i_h) * DK * DV
            o_s = b_k_d[None, :] * s_carry_row + b_v_d[:, None] * s_carry_col
            state = tl.load(p_carry + o_row + o_s, mask=m_state, other=0.0)
    if HAS_INIT:
        if enters >= 0:
            o_row = (enters * H + i_h) * DK * DV
            o_s = b_k_d[None, :] * s_init_row + b_v_d[:, None] * s_init_col
            state = tl.load(p_init + o_row + o_s, mask=m_state, other=0.0).to(tl.float32)

    if REVERSE:
        m_a = b_t[:, None] >= b_t[None, :]
    else:
        m_a = b_t[None, :] >= b_t[:, None]
    p_q += i_h * s_q_h
    p_k += i_h * s_k_h
    p_v += i_h * s_v_h
    p_o += i_h * s_o_h
    # the chunk after this one is read a step ahead, or every load of tokens would wait for it
    i_c = high - 1 if REVERSE else low
    next_start = tl.load(p_chunks + i_c * 2)
    next_meta = tl.load(p_chunks + i_c * 2 + 1)
    for i in range(low, high):
        start, meta = next_start.to(tl.int64), next_meta
        i_c = tl.maximum(low + high - 2 - i, low) if REVERSE else tl.minimum(i + 1, high - 1)
        next_start = tl.load(p_chunks + i_c * 2)
        next_meta = tl.load(p_chunks + i_c * 2 + 1)
        n = meta & 255
        m_t = (b_t < n)[:, None]
        o_t = (start + b_t)[:, None]
        b_q = tl.load(p_q + o_t * s_q_t + b_k_d[None, :], mask=m_t & m_k_d, other=0.0)
        b_k = tl.load(p_k + o_t * s_k_t + b_k_d[None, :], mask=m_t & m_k_d, other=0.0)
        b_v = tl.load(p_v + o_t * s_v_t + b_v_d[None, :], mask=m_t & m_v_d, other=0.0)
        if REVERSE:
            query_steps = tl.maximum(n - 1 - b_t, 0)
            key_steps = b_t + 1
        else:
            query_steps = b_t + 1
            key_steps = tl.maximum(n - 1 - b_t, 0)
        query_fade = tl.exp2(-slope * query_steps.to(tl.float32))
        key_fade = tl.exp2(-slope * key_steps.to(tl.float32))
        fade = tl.exp2(-slope * n.to(tl.float32))
        if not HAS_INIT:
            # with initial states a segment holds one sequence; without, the carry ends at a border
            fresh = (meta >> (9 if REVERSE else 8)) & 1
            query_fade = tl.where(fresh != 0, 0.0, query_fade)
            fade = tl.where(fresh != 0, 0.0, fade)

        # the state is held transposed, [D of v, D of k]: as left factor it stays in registers
        # [j, i]
        b_a = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        # from n, which changes: as constants of the loop the decays would fill the registers
        log_fade = slope * (n - b_t).to(tl.float32)
        if REVERSE:
            log_a = log_fade[:, None] - log_fade[None, :]
        else:
            log_a = log_fade[None, :] - log_fade[:, None]
        b_a = tl.where(m_a, b_a * tl.exp2(log_a), 0.0).to(b_v.dtype)
        b_o = tl.dot(state.to(b_q.dtype), tl.trans(b_q), input_precision=PRECISION)
        b_o = b_o * query_fade[None, :]
        b_o = tl.dot(tl.trans(b_v), b_a, b_o, input_precision=PRECISION)
        b_kf = (b_k * key_fade[:, None]).to(b_k.dtype)
        state = tl.dot(tl.trans(b_v), b_kf, state * fade, input_precision=PRECISION)
        tl.store(p_o + o_t * s_o_t + b_v_d[None, :], tl.trans(_cast(b_o, p_o)), mask=m_t & m_v_d)
    if HAS_FINAL:
        if leaves >= 0:
            o_row = (leaves * H + i_h) * DK * DV
            o_s = b_k_d[None, :] * s_final_row + b_v_d[:, None] * s_final_col
            tl.store(p_final + o_row + o_s, state, mask=m_state)


@triton.jit
def lightning_step(
    p_q, p_k, p_v, p_o, p_slopes, p_states, p_index,
    s_q_t, s_q_h, s_k_t, s_k_h, s_v_t, s_v_h,
    s_slot,
    H,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one sequence and head: the slot's state is read once, updated, written once."""
    i_v, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_s = tl.program_id(2).to(tl.int64)
    fade = tl.exp(-tl.load(p_slopes + i_h))
    slot = tl.load(p_index + i_s).to(tl.int64)
    b_d = tl.arange(0, BD)
    b_e = i_v * BV + tl.arange(0, BV)
    m_d, m_e = b_d < D, b_e < D
    m_state = m_d[:, None] & m_e[None, :]
    o_state = p_states + slot * s_slot + i_h * D * D + b_d[:, None] * D + b_e[None, :]
    state = tl.load(o_state, mask=m_state, other=0.0)
    b_q = tl.load(p_q + i_s * s_q_t + i_h * s_q_h + b_d, mask=m_d, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + i_s * s_k_t + i_h * s_k_h + b_d, mask=m_d, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + i_s * s_v_t + i_h * s_v_h + b_e, mask=m_e, other=0.0).to(tl.float32)
    state = state * fade + b_k[:, None] * b_v[None, :]
    tl.store(o_state, state, mask=m_state)
    b_o = tl.sum(b_q[:, None] * state, axis=0)
    tl.store(p_o + (i_s * H + i_h) * D + b_e, _cast(b_o, p_o), mask=m_e)
