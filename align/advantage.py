"""Scores of a group of responses to one prompt -> how much better each was than its group.

    group:  (r - mean of group) / (std of group + 1e-4)
    batch:  (r - mean of group) / (std of all + 1e-4)
    none:    r - mean of group

A score that is not valid says nothing: its response is left out of the means and has no advantage.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reward.types import Score

Scale = Literal["group", "batch", "none"]

# Added to the deviation, so that a group of nearly equal scores is not blown up.
EPSILON = 1e-4


@dataclass(frozen=True)
class Advantages:
    """What a batch of groups has to teach.

    Args:
        values: one per response, in the shape of the groups; None where the score is not valid.
        num_invalid: responses without a valid score.
        num_flat: groups whose valid scores are all equal (or fewer than two): nothing to learn.
    """

    values: tuple[tuple[float | None, ...], ...]
    num_invalid: int
    num_flat: int


def advantages(groups: Sequence[Sequence[Score]], scale: Scale = "group") -> Advantages:
    """Advantage of each response within its group.

    Args:
        groups: scores of the responses to one prompt each.
        scale: what the difference from the group's mean is divided by.

    Raises:
        ValueError: if a valid score is not a finite number.

    Source: TRL 1.16 GRPOTrainer (scale_rewards), sample standard deviation (n - 1). Where we
        differ: a group or batch with one valid score has deviation 0, not nan.

    Example:
        >>> advantages([[Score(1.0), Score(0.0), Score(9.0, valid=False)]], "none").values
        ((0.5, -0.5, None),)
    """
    valid = [[score.value for score in group if score.valid] for group in groups]
    every = [value for values in valid for value in values]
    if not all(math.isfinite(value) for value in every):
        bad = next(value for value in every if not math.isfinite(value))
        raise ValueError(
            f"score = {bad} is marked valid, expected a finite number; a judge that failed must "
            "say valid=False"
        )
    over_all = _deviation(every)
    results = []
    for group, values in zip(groups, valid, strict=True):
        mean = _mean(values)
        spread = {"group": _deviation(values), "batch": over_all, "none": 1.0 - EPSILON}[scale]
        results.append(
            tuple((s.value - mean) / (spread + EPSILON) if s.valid else None for s in group)
        )
    return Advantages(
        values=tuple(results),
        num_invalid=sum(len(group) for group in groups) - len(every),
        num_flat=sum(is_flat(values) for values in valid),
    )


def is_flat(values: Sequence[float]) -> bool:
    """Whether there is nothing to compare: all equal, one, or none.

    Example:
        >>> is_flat([0.5, 0.5]), is_flat([0.5, 1.0])
        (True, False)
    """
    return max(values, default=0.0) == min(values, default=0.0)


def _mean(values: Sequence[float]) -> float:
    # equal values must differ from their mean by exactly 0, which fmean's rounding does not promise
    return max(values, default=0.0) if is_flat(values) else statistics.fmean(values)


def _deviation(values: Sequence[float]) -> float:
    return 0.0 if is_flat(values) else statistics.stdev(values)
