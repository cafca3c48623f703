"""Several sources to one list: how often each row is seen is decided here, openly.

    by epochs   a source of n rows with weight w gives w * n rows: 0.5 a half, 2 every row twice
    by rows     weights are shares of the rows; as many rows in all as the sources have
    by tokens   weights are shares of the tokens; as many tokens in all as the sources have

Whole repeats come first, then a part drawn without replacement by the seed, in the source's order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

By = Literal["epochs", "rows", "tokens"]


def mix(
    lengths: Sequence[Sequence[int]], weights: Sequence[float], *, by: By = "epochs", seed: int = 0
) -> list[list[int]]:
    """For each source, the indices of its rows that are taken, repeats and all.

    Args:
        lengths: tokens of each row of each source.
        weights: one for each source, > 0.
        by: what a weight means, see above.

    Raises:
        ValueError: if a source is empty, a weight is not above 0 or their numbers differ.

    Example:
        >>> mix([[5, 5, 5], [9]], [1.0, 2.0])
        [[0, 1, 2], [0, 0]]
    """
    if len(lengths) != len(weights) or not all(weight > 0 for weight in weights):
        raise ValueError(
            f"weights = {list(weights)} for {len(lengths)} sources, expected one above 0 for each"
        )
    if not all(lengths):
        raise ValueError(f"source {[bool(each) for each in lengths].index(False)} has no rows")
    wanted = _counts(lengths, weights, by)
    return [
        _take(len(each), count, random.Random(f"{seed}/{number}"))
        for number, (each, count) in enumerate(zip(lengths, wanted, strict=True))
    ]


def _counts(lengths: Sequence[Sequence[int]], weights: Sequence[float], by: By) -> list[int]:
    """Rows to take of each source; at least one."""
    if by == "epochs":
        return [
            max(1, round(len(each) * weight)) for each, weight in zip(lengths, weights, strict=True)
        ]
    shares = [weight / sum(weights) for weight in weights]
    if by == "rows":
        total = sum(len(each) for each in lengths)
        return [max(1, round(total * share)) for share in shares]
    total = sum(sum(each) for each in lengths)
    return [
        max(1, round(total * share * len(each) / sum(each)))
        for each, share in zip(lengths, shares, strict=True)
    ]


def _take(size: int, count: int, rng: random.Random) -> list[int]:
    whole, part = divmod(count, size)
    return [*range(size)] * whole + sorted(rng.sample(range(size), part))
