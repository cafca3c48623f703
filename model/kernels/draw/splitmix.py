"""Random numbers that are a hash of counters, the same on every device."""

from __future__ import annotations

from torch import Tensor

MASK_63 = (1 << 63) - 1
# SplitMix64's increment and multipliers (Steele, Lea, Flood 2014), as signed 64-bit integers.
INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser of int64 values: a bijection whose every output bit depends on all."""
    for shift, multiplier in MULTIPLIERS:
        # torch shifts int64 arithmetically; the mask makes the shift logical
        value = (value ^ ((value >> shift) & (MASK_63 >> (shift - 1)))) * multiplier
    return value ^ ((value >> 31) & (MASK_63 >> 30))


def uniform(seed: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """[N] fp64 in [0, 1), 53 random bits: a pure function of three int64 counters.

    Source: SplitMix64 applied in turn to each counter, which is how it seeds independent streams.

    Example:
        >>> import torch
        >>> one, two = torch.tensor([1]), torch.tensor([2])
        >>> bool(uniform(one, two, one) == uniform(one, one, two))
        False
    """
    state = mix(seed + INCREMENT)
    state = mix((state ^ sample) + INCREMENT)
    state = mix((state ^ position) + INCREMENT)
    bits = (state >> 11) & ((1 << 53) - 1)
    return bits.double() * 2.0**-53
