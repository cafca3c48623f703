"""Several sources to one list: how often each row is seen is decided here, openly.

A source of n rows with weight w gives round(w * n) rows per epoch: 0.5 a half of them, 2 every row
twice. Whole repeats come first, then a part drawn without replacement by the seed, in the source's
own order; so its share of the mixture is w * n, and no row is seen twice before all were seen once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def mix(sizes: Sequence[int], weights: Sequence[float], *, seed: int = 0) -> list[list[int]]:
    """For each source, the indices of its rows that are taken, repeats and all; at least one.

    Args:
        sizes: rows of each source.
        weights: one for each source, > 0: passes over it per epoch.

    Raises:
        ValueError: if a source is empty, a weight is not above 0 or their numbers differ.

    Example:
        >>> mix([3, 1], [1.0, 2.0])
        [[0, 1, 2], [0, 0]]
    """
    if len(sizes) != len(weights) or not all(weight > 0 for weight in weights):
        raise ValueError(
            f"weights = {list(weights)} for {len(sizes)} sources, expected one above 0 for each"
        )
    if not all(sizes):
        raise ValueError(f"source {list(sizes).index(0)} has no rows")
    return [
        _take(size, max(1, round(size * weight)), random.Random(f"{seed}/{number}"))
        for number, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]


def _take(size: int, count: int, rng: random.Random) -> list[int]:
    whole, part = divmod(count, size)
    return [*range(size)] * whole + sorted(rng.sample(range(size), part))
