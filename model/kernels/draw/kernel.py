"""Device code of `launch.py`: a row of logits is read twice, and once more where its token lies."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(value, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """SplitMix64's finaliser of a uint64."""
    value = (value ^ (value >> 30)) * FIRST
    value = (value ^ (value >> 27)) * SECOND
    return value ^ (value >> 31)


@triton.jit
def _weights(p_row, b_v, vocabulary, most, scale):
    """exp((logit - most) * scale) of a block of the row, fp32, 0 behind its end."""
    b_x = tl.load(p_row + b_v, mask=b_v < vocabulary, other=float("-inf")).to(tl.float32)
    return tl.where(b_v < vocabulary, tl.exp((b_x - most) * scale), 0.0)


@triton.jit
def draw_rows(
    p_logits, p_temperature, p_seed, p_sample, p_position, p_tokens, p_logprobs, p_drawn,
    s_row, vocabulary,
    BV: tl.constexpr, BN: tl.constexpr, TEMPERED: tl.constexpr, GREEDY: tl.constexpr,
    INCREMENT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """One row's token, its log-probability, and that under the temperature.

    Sums are fp64: of BN blocks of BV tokens each, of which the token's own is then read again.
    """
    i_r = tl.program_id(0)
    p_row = p_logits + i_r.to(tl.int64) * s_row
    temperature = tl.load(p_temperature + i_r)
    scale = 1.0 / tl.where(temperature > 0, temperature, 1.0) if TEMPERED else 1.0

    b_lane, b_block = tl.arange(0, BV), tl.arange(0, BN)
    b_most = tl.full((BV,), float("-inf"), tl.float32)
    b_first = tl.zeros((BV,), tl.int32)
    for o_v in range(0, vocabulary, BV):
        b_v = o_v + b_lane
        b_x = tl.load(p_row + b_v, mask=b_v < vocabulary, other=float("-inf")).to(tl.float32)
        b_first = tl.where(b_x > b_most, b_v, b_first)
        b_most = tl.maximum(b_most, b_x)
    most = tl.max(b_most, 0)

    total = tl.zeros((), tl.float64)
    b_sum = tl.zeros((BN,), tl.float64)
    for i_b in range(tl.cdiv(vocabulary, BV)):
        b_e = _weights(p_row, i_b * BV + b_lane, vocabulary, most, scale)
        b_sum = tl.where(b_block == i_b, tl.sum(b_e.to(tl.float64), 0), b_sum)
        if TEMPERED:
            b_e = _weights(p_row, i_b * BV + b_lane, vocabulary, most, 1.0)
            total += tl.sum(b_e.to(tl.float64), 0)
    mass = tl.sum(b_sum, 0)
    if not TEMPERED:
        total = mass

    state = _mix(tl.load(p_seed + i_r).to(tl.uint64) + INCREMENT, FIRST, SECOND)
    state = _mix((state ^ tl.load(p_sample + i_r).to(tl.uint64)) + INCREMENT, FIRST, SECOND)
    state = _mix((state ^ tl.load(p_position + i_r).to(tl.uint64)) + INCREMENT, FIRST, SECOND)
    point = (state >> 11).to(tl.float64) * 1.1102230246251565e-16 * mass

    # rounding may leave the point behind the last border: then it is the last token with a weight
    last = tl.max(tl.where(b_sum > 0, b_block, 0), 0)
    i_here = tl.minimum(tl.sum((tl.cumsum(b_sum, 0) <= point).to(tl.int32), 0), last)
    before = tl.sum(tl.where(b_block < i_here, b_sum, 0.0), 0)
    b_e = _weights(p_row, i_here * BV + b_lane, vocabulary, most, scale)
    b_border = before + tl.cumsum(b_e.to(tl.float64), 0)
    last = tl.max(tl.where(b_e > 0, b_lane, 0), 0)
    i_token = i_here * BV + tl.minimum(tl.sum((b_border <= point).to(tl.int32), 0), last)
    if GREEDY:
        is_greedy = temperature == 0
        # the first of equals; of a row that is no number, any
        i_most = tl.min(tl.where(b_most == most, b_first, vocabulary - 1), 0)
        i_token = tl.where(is_greedy, i_most, i_token)

    # loaded as the row's own dtype, and nan where any of the row is
    under = tl.load(p_row + i_token).to(tl.float32) - most
    drawn = under * scale - tl.log(mass)
    if GREEDY:
        drawn = tl.where(is_greedy, 0.0, drawn)
    tl.store(p_tokens + i_r, i_token.to(tl.int64))
    tl.store(p_logprobs + i_r, (under - tl.log(total)).to(tl.float32))
    tl.store(p_drawn + i_r, drawn.to(tl.float32))
