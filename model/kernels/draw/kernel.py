"""Triton kernel that draws one token from each row of logits, started by `launch.py`.

    w_i = exp((x_i - max x) / temperature)
    token = the first i with w_0 + .. + w_i > u * (w_0 + .. + w_V)

One program has one row. It sums w block by block in fp64, then adds the blocks up again until the
point lies in one, and only that block gets a cumulative sum.
"""

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, sample, position):
    """As `rollout.native.sampler.uniform`: a hash of three int64 counters, in [0, 1)."""
    state = _mix(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    state = _mix((state ^ sample.to(tl.uint64, bitcast=True)) + 0x9E3779B97F4A7C15)
    state = _mix((state ^ position.to(tl.uint64, bitcast=True)) + 0x9E3779B97F4A7C15)
    # 53 bits: exact in fp64
    return (state >> 11).to(tl.int64, bitcast=True).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _weights(p_x, b_v, V, greatest, inverse):
    b_x = tl.load(p_x + b_v, mask=b_v < V, other=float("-inf"))
    return tl.exp((b_x - greatest) * inverse)


@triton.jit(do_not_specialize=["V"])
def draw_row(
    p_logits, p_temperature, p_seed, p_sample, p_position, p_tokens, p_logprobs, p_tempered,
    s_row, V,
    BV: tl.constexpr, IS_TEMPERED: tl.constexpr, HAS_GREEDY: tl.constexpr,
):  # fmt: skip
    """Token of one row, its log-probability at temperature 1, and under what was drawn from."""
    i_r = tl.program_id(0).to(tl.int64)
    p_x = p_logits + i_r * s_row
    b_max = tl.full((BV,), float("-inf"), tl.float32)
    for start in range(0, V, BV):
        b_v = start + tl.arange(0, BV)
        b_max = tl.maximum(b_max, tl.load(p_x + b_v, mask=b_v < V, other=float("-inf")))
    greatest = tl.max(b_max, axis=0)
    inverse = 1.0
    if IS_TEMPERED:
        temperature = tl.load(p_temperature + i_r)
        inverse = 1.0 / tl.where(temperature > 0, temperature, 1.0)

    total = tl.zeros((), tl.float64)
    # at temperature 1
    plain = tl.zeros((), tl.float64)
    best = V
    for start in range(0, V, BV):
        b_v = start + tl.arange(0, BV)
        total += tl.sum(_weights(p_x, b_v, V, greatest, inverse).to(tl.float64), axis=0)
        b_x = tl.load(p_x + b_v, mask=b_v < V, other=float("-inf"))
        best = tl.minimum(best, tl.min(tl.where(b_x == greatest, b_v, V), axis=0))
        if IS_TEMPERED:
            plain += tl.sum(tl.exp(b_x - greatest).to(tl.float64), axis=0)

    seed, sample = tl.load(p_seed + i_r), tl.load(p_sample + i_r)
    point = _uniform(seed, sample, tl.load(p_position + i_r)) * total
    # rounded up, it could be the whole sum, which no block reaches beyond
    point = tl.minimum(point, total * (1.0 - 2.220446049250313e-16))
    # a row of nan finds none
    token = tl.minimum(best, V - 1)
    base = tl.zeros((), tl.float64)
    is_open = True
    for start in range(0, V, BV):
        b_v = start + tl.arange(0, BV)
        b_w = _weights(p_x, b_v, V, greatest, inverse).to(tl.float64)
        after = base + tl.sum(b_w, axis=0)
        if is_open & (after > point):
            b_before = (base + tl.cumsum(b_w, axis=0) <= point) & (b_v < V)
            # the last that weighs anything: two orders of a sum may differ in the last bit
            last = tl.max(tl.where(b_w > 0, b_v, -1), axis=0)
            token = tl.minimum(start + tl.sum(b_before.to(tl.int32), axis=0), last)
            is_open = False
        base = after
    if HAS_GREEDY:
        is_greedy = tl.load(p_temperature + i_r) == 0
        token = tl.where(is_greedy, tl.minimum(best, V - 1), token)
    gap = tl.load(p_x + token) - greatest
    tempered = gap * inverse - tl.log(total).to(tl.float32)
    logprob = tempered
    if IS_TEMPERED:
        logprob = gap - tl.log(plain).to(tl.float32)
    if HAS_GREEDY:
        tempered = tl.where(is_greedy, 0.0, tempered)
    tl.store(p_tokens + i_r, token.to(tl.int64))
    tl.store(p_logprobs + i_r, logprob)
    tl.store(p_tempered + i_r, tempered)
