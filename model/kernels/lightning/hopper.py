"""Gluon kernels of lightning attention for Hopper: the passes of `kernel.py`, scheduled by hand.

Tokens arrive by bulk copies two chunks ahead; matrix products run while the registers of the one
before are scaled, masked and rounded. One program of D / 16 warps holds the whole fp32 state of a
head. The backward pass gives dk and dv from one carry. Products of a chunk, of 16-bit operands:

    A = K Q^T          O = S^T Q^T          S' = fade S + V^T (fade K)          O' = fade O + V^T A
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# triton 3.6 to 3.9 renamed both
copy_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
sync_warps = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _chunk_index(low, high, i, REVERSE: gl.constexpr):
    """The i-th chunk in the pass's time, the last one again past the end."""
    if REVERSE:
        i_c = gl.maximum(low + high - 1 - i, low)
    else:
        i_c = gl.minimum(i, high - 1)
    return i_c


@gluon.jit
def _load_state(state, p_state, row, i_h, H, s_row, s_col, D: gl.constexpr):
    """State `row` of a head if row >= 0, else `state`."""
    if row >= 0:
        b_row = gl.arange(0, D, gl.SliceLayout(1, state.type.layout))
        b_col = gl.arange(0, D, gl.SliceLayout(0, state.type.layout))
        o_state = (row * H + i_h) * D * D + b_row[:, None] * s_row + b_col[None, :] * s_col
        state = gl.load(p_state + o_state).to(gl.float32)
    return state


@gluon.jit
def _store_state(state, p_state, row, i_h, H, s_row, s_col, D: gl.constexpr):
    if row >= 0:
        b_row = gl.arange(0, D, gl.SliceLayout(1, state.type.layout))
        b_col = gl.arange(0, D, gl.SliceLayout(0, state.type.layout))
        o_state = (row * H + i_h) * D * D + b_row[:, None] * s_row + b_col[None, :] * s_col
        gl.store(p_state + o_state, state)


@gluon.jit
def lightning_run_hopper(
    d_q, d_k, d_v, p_o, p_slopes, p_chunks, p_segments, p_carry, p_init, p_final,
    s_q_h, s_k_h, s_v_h, s_o_t, s_o_h,
    s_carry_row, s_carry_col, s_init_row, s_init_col, s_final_row, s_final_col,
    H,
    D: gl.constexpr, BT: gl.constexpr, STAGES: gl.constexpr, REVERSE: gl.constexpr,
    HAS_CARRY: gl.constexpr, HAS_INIT: gl.constexpr, HAS_FINAL: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """One pass over one segment for one head."""
    i_h = gl.program_id(0).to(gl.int64)
    i_s = gl.program_id(1)
    slope = gl.load(p_slopes + i_h) * 1.4426950408889634
    low = gl.load(p_segments + i_s * 5)
    high = gl.load(p_segments + i_s * 5 + 1)
    dtype: gl.constexpr = d_q.dtype
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BT, 16])
    mma_a: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, num_warps // 4], [16, BT * 4 // num_warps, 16]
    )
    op_s: gl.constexpr = gl.DotOperandLayout(0, mma_o, 2)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [num_warps, 1], [1, 0])

    q_s = gl.allocate_shared_memory(dtype, [STAGES, BT, D], d_q.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BT, D], d_k.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BT, D], d_v.layout)
    kf_s = gl.allocate_shared_memory(dtype, [BT, D], d_k.layout)
    a_s = gl.allocate_shared_memory(dtype, [BT, BT], gl.NVMMASharedLayout(128, 16, 2))
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    c_q, c_k = (i_h * s_q_h).to(gl.int32), (i_h * s_k_h).to(gl.int32)
    c_v = (i_h * s_v_h).to(gl.int32)
    for i in gl.static_range(STAGES):
        if low + i < high:
            t = gl.load(p_chunks + _chunk_index(low, high, low + i, REVERSE) * 2)
            mbarrier.expect(bars.index(i), 3 * BT * D * 2)
            copy_block(d_q, [t, c_q], bars.index(i), q_s.index(i))
            copy_block(d_k, [t, c_k], bars.index(i), k_s.index(i))
            copy_block(d_v, [t, c_v], bars.index(i), v_s.index(i))

    # transposed, [D of v, D of k]: as left factor it stays in registers
    state = gl.zeros([D, D], gl.float32, mma_s)
    if HAS_CARRY:
        row = gl.load(p_segments + i_s * 5 + 2).to(gl.int64)
        state = _load_state(state, p_carry, row, i_h, H, s_carry_col, s_carry_row, D)
    if HAS_INIT:
        row = gl.load(p_segments + i_s * 5 + 3).to(gl.int64)
        state = _load_state(state, p_init, row, i_h, H, s_init_col, s_init_row, D)

    t_j = gl.arange(0, BT, gl.SliceLayout(1, mma_a))
    t_i = gl.arange(0, BT, gl.SliceLayout(0, mma_a))
    t_o = gl.arange(0, BT, gl.SliceLayout(0, mma_o))
    t_r = gl.arange(0, BT, gl.SliceLayout(1, rows))
    d_r = gl.arange(0, D, gl.SliceLayout(0, rows))
    p_o += i_h * s_o_h
    stage = 0
    phase = 0
    i_c = _chunk_index(low, high, low, REVERSE)
    start = gl.load(p_chunks + i_c * 2)
    meta = gl.load(p_chunks + i_c * 2 + 1)
    for i in range(low, high):
        n = meta & 255
        i_c = _chunk_index(low, high, i + 1, REVERSE)
        next_start = gl.load(p_chunks + i_c * 2)
        next_meta = gl.load(p_chunks + i_c * 2 + 1)
        # rows past n hold other sequences' tokens, which no product may take in
        if REVERSE:
            query_steps, key_steps = gl.maximum(n - 1 - t_o, 0), t_r + 1
            log_i, log_j = slope * (t_i - n).to(gl.float32), slope * (t_j - n).to(gl.float32)
            m_a = (t_j[:, None] >= t_i[None, :]) & (t_j < n)[:, None]
        else:
            query_steps, key_steps = t_o + 1, gl.maximum(n - 1 - t_r, 0)
            log_i, log_j = slope * (n - t_i).to(gl.float32), slope * (n - t_j).to(gl.float32)
            m_a = t_i[None, :] >= t_j[:, None]
        query_fade = gl.exp2(-slope * query_steps.to(gl.float32))
        key_fade = gl.where(t_r < n, gl.exp2(-slope * key_steps.to(gl.float32)), 0.0)
        fade = gl.exp2(-slope * n.to(gl.float32))
        if not HAS_INIT:
            # with initial states a segment holds one sequence; without, the carry ends at a border
            fresh = ((meta >> (9 if REVERSE else 8)) & 1) != 0
            query_fade = gl.where(fresh, 0.0, query_fade)
            fade = gl.where(fresh, 0.0, fade)

        q_c, k_c, v_c = q_s.index(stage), k_s.index(stage), v_s.index(stage)
        mbarrier.wait(bars.index(stage), phase)
        b_a = gl.zeros([BT, BT], gl.float32, mma_a)
        b_a = warpgroup_mma(k_c, q_c.permute((1, 0)), b_a, use_acc=False, is_async=True)
        b_s = gl.convert_layout(state.to(dtype), op_s)
        b_o = gl.zeros([D, BT], gl.float32, mma_o)
        b_o = warpgroup_mma(b_s, q_c.permute((1, 0)), b_o, use_acc=False, is_async=True)
        b_k = k_c.load(rows)
        kf_s.store((b_k.to(gl.float32) * key_fade[:, None]).to(dtype))
        state = state * fade
        b_a = warpgroup_mma_wait(1, deps=(b_a,))
        decay = gl.exp2(log_i[None, :] - log_j[:, None])
        a_s.store(gl.where(m_a, b_a * decay, 0.0).to(dtype))
        fence_async_shared()
        sync_warps()
        state = warpgroup_mma(v_c.permute((1, 0)), kf_s, state, is_async=True)
        b_o = warpgroup_mma_wait(1, deps=(b_o,))
        b_o = b_o * query_fade[None, :]
        b_o = warpgroup_mma(v_c.permute((1, 0)), a_s, b_o, is_async=True)
        b_o, state = warpgroup_mma_wait(0, deps=(b_o, state))
        # every warp is done with this stage before it is filled again
        sync_warps()
        if i + STAGES < high:
            t = gl.load(p_chunks + _chunk_index(low, high, i + STAGES, REVERSE) * 2)
            mbarrier.expect(bars.index(stage), 3 * BT * D * 2)
            copy_block(d_q, [t, c_q], bars.index(stage), q_c)
            copy_block(d_k, [t, c_k], bars.index(stage), k_c)
            copy_block(d_v, [t, c_v], bars.index(stage), v_c)
        b_out = gl.convert_layout(b_o.to(dtype).permute((1, 0)), rows)
        o_t = (start + t_r).to(gl.int64)[:, None]
        gl.store(p_o + o_t * s_o_t + d_r[None, :], b_out, mask=(t_r < n)[:, None])
        start, meta = next_start, next_meta
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(i))
    if HAS_FINAL:
        row = gl.load(p_segments + i_s * 5 + 4).to(gl.int64)
        _store_state(state, p_final, row, i_h, H, s_final_col, s_final_row, D)


@gluon.jit
def lightning_bwd_keys_values(
    d_q, d_k, d_v, d_do, p_dk, p_dv, p_slopes, p_chunks, p_segments, p_carry, p_init, p_final,
    s_q_h, s_k_h, s_v_h, s_do_h, s_dk_t, s_dk_h, s_dv_t, s_dv_h,
    H,
    D: gl.constexpr, BT: gl.constexpr, STAGES: gl.constexpr,
    HAS_CARRY: gl.constexpr, HAS_INIT: gl.constexpr, HAS_FINAL: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """dk and dv of one segment, backwards in time, from one carry of the state's gradient."""
    i_h = gl.program_id(0).to(gl.int64)
    i_s = gl.program_id(1)
    slope = gl.load(p_slopes + i_h) * 1.4426950408889634
    low = gl.load(p_segments + i_s * 5)
    high = gl.load(p_segments + i_s * 5 + 1)
    dtype: gl.constexpr = d_q.dtype
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BT, 16])
    mma_a: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, num_warps // 4], [16, BT * 4 // num_warps, 16]
    )
    op_s: gl.constexpr = gl.DotOperandLayout(0, mma_o, 2)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [num_warps, 1], [1, 0])
    plain: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    q_s = gl.allocate_shared_memory(dtype, [STAGES, BT, D], d_q.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BT, D], d_k.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BT, D], d_v.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, BT, D], d_do.layout)
    state_s = gl.allocate_shared_memory(dtype, [D, D], plain)
    dof_s = gl.allocate_shared_memory(dtype, [BT, D], d_do.layout)
    a_s = gl.allocate_shared_memory(dtype, [BT, BT], plain)
    ds_s = gl.allocate_shared_memory(dtype, [BT, BT], plain)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    c_q, c_k = (i_h * s_q_h).to(gl.int32), (i_h * s_k_h).to(gl.int32)
    c_v, c_do = (i_h * s_v_h).to(gl.int32), (i_h * s_do_h).to(gl.int32)
    for i in gl.static_range(STAGES):
        if low + i < high:
            t = gl.load(p_chunks + _chunk_index(low, high, low + i, True) * 2)
            mbarrier.expect(bars.index(i), 4 * BT * D * 2)
            copy_block(d_q, [t, c_q], bars.index(i), q_s.index(i))
            copy_block(d_k, [t, c_k], bars.index(i), k_s.index(i))
            copy_block(d_v, [t, c_v], bars.index(i), v_s.index(i))
            copy_block(d_do, [t, c_do], bars.index(i), do_s.index(i))

    # [D of k, D of v]
    state = gl.zeros([D, D], gl.float32, mma_s)
    if HAS_CARRY:
        row = gl.load(p_segments + i_s * 5 + 2).to(gl.int64)
        state = _load_state(state, p_carry, row, i_h, H, D, 1, D)
    if HAS_INIT:
        row = gl.load(p_segments + i_s * 5 + 3).to(gl.int64)
        state = _load_state(state, p_init, row, i_h, H, D, 1, D)

    t_i = gl.arange(0, BT, gl.SliceLayout(1, mma_a))
    t_j = gl.arange(0, BT, gl.SliceLayout(0, mma_a))
    t_o = gl.arange(0, BT, gl.SliceLayout(0, mma_o))
    t_r = gl.arange(0, BT, gl.SliceLayout(1, rows))
    d_r = gl.arange(0, D, gl.SliceLayout(0, rows))
    p_dk += i_h * s_dk_h
    p_dv += i_h * s_dv_h
    stage = 0
    phase = 0
    start = gl.load(p_chunks + (high - 1) * 2)
    meta = gl.load(p_chunks + (high - 1) * 2 + 1)
    for i in range(low, high):
        n = meta & 255
        i_c = _chunk_index(low, high, i + 1, True)
        next_start = gl.load(p_chunks + i_c * 2)
        next_meta = gl.load(p_chunks + i_c * 2 + 1)
        carry_fade = gl.exp2(-slope * gl.maximum(n - 1 - t_o, 0).to(gl.float32))
        query_fade = gl.where(t_r < n, gl.exp2(-slope * (t_r + 1).to(gl.float32)), 0.0)
        fade = gl.exp2(-slope * n.to(gl.float32))
        if not HAS_INIT:
            fresh = ((meta >> 9) & 1) != 0
            carry_fade = gl.where(fresh, 0.0, carry_fade)
            fade = gl.where(fresh, 0.0, fade)
        log_i, log_j = slope * (n - t_i).to(gl.float32), slope * (n - t_j).to(gl.float32)
        m_a = (t_i[:, None] >= t_j[None, :]) & (t_i < n)[:, None]

        q_c, k_c = q_s.index(stage), k_s.index(stage)
        v_c, do_c = v_s.index(stage), do_s.index(stage)
        mbarrier.wait(bars.index(stage), phase)
        # [i, j]: gradient of the score of query i on key j, and the score itself
        b_ds = gl.zeros([BT, BT], gl.float32, mma_a)
        b_ds = warpgroup_mma(do_c, v_c.permute((1, 0)), b_ds, use_acc=False, is_async=True)
        b_a = gl.zeros([BT, BT], gl.float32, mma_a)
        b_a = warpgroup_mma(q_c, k_c.permute((1, 0)), b_a, use_acc=False, is_async=True)
        b_s = state.to(dtype)
        state_s.store(b_s)
        b_dk = gl.zeros([D, BT], gl.float32, mma_o)
        b_dk = warpgroup_mma(
            gl.convert_layout(b_s, op_s), v_c.permute((1, 0)), b_dk, use_acc=False, is_async=True
        )
        b_do = do_c.load(rows)
        dof_s.store((b_do.to(gl.float32) * query_fade[:, None]).to(dtype))
        state = state * fade
        fence_async_shared()
        sync_warps()
        b_dv = gl.zeros([D, BT], gl.float32, mma_o)
        b_dv = warpgroup_mma(
            state_s.permute((1, 0)), k_c.permute((1, 0)), b_dv, use_acc=False, is_async=True
        )
        state = warpgroup_mma(q_c.permute((1, 0)), dof_s, state, is_async=True)
        b_ds, b_a = warpgroup_mma_wait(3, deps=(b_ds, b_a))
        decay = gl.exp2(log_i[:, None] - log_j[None, :])
        ds_s.store(gl.where(m_a, b_ds * decay, 0.0).to(dtype))
        a_s.store(gl.where(m_a, b_a * decay, 0.0).to(dtype))
        fence_async_shared()
        sync_warps()
        b_dk = warpgroup_mma_wait(2, deps=(b_dk,))
        b_dk = b_dk * carry_fade[None, :]
        b_dk = warpgroup_mma(q_c.permute((1, 0)), ds_s, b_dk, is_async=True)
        b_dv = warpgroup_mma_wait(2, deps=(b_dv,))
        b_dv = b_dv * carry_fade[None, :]
        b_dv = warpgroup_mma(do_c.permute((1, 0)), a_s, b_dv, is_async=True)
        b_dk, state = warpgroup_mma_wait(1, deps=(b_dk, state))
        o_t = (start + t_r).to(gl.int64)[:, None]
        m_t = (t_r < n)[:, None]
        b_out = gl.convert_layout(b_dk.to(dtype).permute((1, 0)), rows)
        gl.store(p_dk + o_t * s_dk_t + d_r[None, :], b_out, mask=m_t)
        b_dv = warpgroup_mma_wait(0, deps=(b_dv,))
        # every warp is done with this stage before it is filled again
        sync_warps()
        if i + STAGES < high:
            t = gl.load(p_chunks + _chunk_index(low, high, i + STAGES, True) * 2)
            mbarrier.expect(bars.index(stage), 4 * BT * D * 2)
            copy_block(d_q, [t, c_q], bars.index(stage), q_c)
            copy_block(d_k, [t, c_k], bars.index(stage), k_c)
            copy_block(d_v, [t, c_v], bars.index(stage), v_c)
            copy_block(d_do, [t, c_do], bars.index(stage), do_c)
        b_out = gl.convert_layout(b_dv.to(dtype).permute((1, 0)), rows)
        gl.store(p_dv + o_t * s_dv_t + d_r[None, :], b_out, mask=m_t)
        start, meta = next_start, next_meta
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(i))
    if HAS_FINAL:
        row = gl.load(p_segments + i_s * 5 + 4).to(gl.int64)
        _store_state(state, p_final, row, i_h, H, D, 1, D)
