"""How far a lead can be believed: from logits to the chance that an answer is preferred.

A reward model's lead d = s+ - s- is trained as logit, but nothing makes sigmoid(d) a frequency. On
held-out pairs a temperature T (Guo et al., 2017, arXiv 1706.04599) or a monotone step function
(isotonic regression, pool adjacent violators) is fitted, so that of pairs told apart with chance p
a share p is ranked as people ranked them. Both orders of a pair are used: P(-d) = 1 - P(d).

What is reported beside it: accuracy and expected calibration error of any slice of the pairs, from
chances that were fitted without the pair they judge.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward.hierarchy import sigmoid

Method = Literal["temperature", "isotonic"]

CALIBRATION_FILE = "calibration.json"
COLDEST, HOTTEST = 0.01, 100.0
NUM_BINS = 10


class Calibration(BaseModel):
    """A fitted map from a lead to the chance of being preferred.

    Example:
        >>> Calibration(temperature=2.0, num_pairs=9).probability(0.0)
        0.5
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "temperature"
    """Which map it is."""
    temperature: float = Field(default=1.0, gt=0)
    """Leads are divided by it; not used by `isotonic`."""
    leads: tuple[float, ...] = ()
    """Rising leads >= 0 of the steps, for `isotonic`; their negatives are steps too."""
    chances: tuple[float, ...] = ()
    """Chance at each of them, 0.5 to 1, never falling; between two of them it is interpolated."""
    num_pairs: int = Field(ge=0)
    """Held-out pairs that it was fitted on."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        lists = (self.leads, self.chances)
        if len(self.leads) != len(self.chances) or any(list(x) != sorted(x) for x in lists):
            raise ValueError("leads and chances must be rising and as many of one as of the other")
        if self.method == "isotonic" and not self.leads:
            raise ValueError("method = isotonic without leads, expected one or more")
        return self

    def probability(self, lead: float) -> float:
        """Chance that an answer ahead by `lead` logits is the preferred one, in (0, 1)."""
        if self.method == "temperature":
            return sigmoid(lead / self.temperature)
        size = abs(lead)
        at = bisect_right(self.leads, size)
        if at == len(self.leads):
            chance = self.chances[-1]
        else:
            left, low = (self.leads[at - 1], self.chances[at - 1]) if at else (0.0, 0.5)
            right, high = self.leads[at], self.chances[at]
            chance = low + (high - low) * (size - left) / (right - left) if right > left else high
        return chance if lead >= 0 else 1 - chance


def fit(leads: Sequence[float], method: Method = "temperature") -> Calibration:
    """The map that fits held-out pairs.

    Args:
        leads: chosen minus rejected of each pair, in logits; negative where the model was wrong.

    Raises: ValueError if there is no pair.

    Example:
        >>> round(fit([1.0, 1.0, 1.0, -1.0] * 50).probability(1.0), 2)  # right three times in four
        0.75
    """
    if not leads:
        raise ValueError("calibration: no held-out pairs, expected one or more")
    if method == "temperature":
        return Calibration(temperature=_temperature(leads), num_pairs=len(leads))
    steps = _isotonic(leads)
    return Calibration(
        method="isotonic",
        leads=tuple(lead for lead, _ in steps),
        chances=tuple(chance for _, chance in steps),
        num_pairs=len(leads),
    )


def _temperature(leads: Sequence[float]) -> float:
    """Least mean log loss; convex in 1 / T, so the root of its slope is found by halving."""
    # A pair of typical size either way, so that no model is held to be infallible, nor all luck.
    size = sum(abs(lead) for lead in leads) / len(leads)
    # With as many right as wrong among equals the root is at 0: then T is the hottest.
    known = torch.tensor([*leads, size, -size], dtype=torch.float64)

    def slope(inverse: float) -> float:
        return float(known @ torch.sigmoid(-known * inverse))

    low, high = 1 / HOTTEST, 1 / COLDEST
    if slope(low) <= 0:
        return HOTTEST
    if slope(high) >= 0:
        return COLDEST
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return round(1 / low, 9)


def _isotonic(leads: Sequence[float]) -> list[tuple[float, float]]:
    """Mean lead and chance of each block of pool adjacent violators over both orders of a pair."""
    # By size: the chance that the side ahead is the preferred one. A tie tells nothing.
    known = sorted((abs(lead), float(lead > 0)) for lead in leads if lead)
    equal: dict[float, list[float]] = {}
    for size, right in known:
        equal.setdefault(size, []).append(right)
    blocks: list[tuple[float, float, int]] = []
    for size, rights in equal.items():
        blocks.append((size, sum(rights) / len(rights), len(rights)))
        while len(blocks) > 1 and blocks[-2][1] >= blocks[-1][1]:
            (s1, r1, n1), (s2, r2, n2) = blocks.pop(), blocks.pop()
            total = n1 + n2
            blocks.append(((s1 * n1 + s2 * n2) / total, (r1 * n1 + r2 * n2) / total, total))
    # Laplace: a block of n pairs never says more than (n + 1) / (n + 2).
    steps = [(size, min(max(right, 0.5), (n + 1) / (n + 2))) for size, right, n in blocks]
    rising: list[tuple[float, float]] = []
    for size, chance in steps:
        rising.append((size, max(chance, rising[-1][1] if rising else 0.5)))
    return rising or [(0.0, 0.5)]


def cross_fitted(
    leads: Sequence[float], method: Method = "temperature", folds: int = 5
) -> list[float]:
    """Chance of each pair's chosen answer under a map fitted without its fold.

    Args:
        leads: in an order that does not group like with like; every folds-th is one fold.

    Raises: ValueError if there are fewer pairs than folds.
    """
    if len(leads) < folds:
        raise ValueError(f"{len(leads)} held-out pairs, expected {folds} or more to fit and test")
    chances = [0.0] * len(leads)
    for fold in range(folds):
        rest = [lead for place, lead in enumerate(leads) if place % folds != fold]
        fitted = fit(rest, method)
        for place in range(fold, len(leads), folds):
            chances[place] = fitted.probability(leads[place])
    return chances


@dataclass(frozen=True)
class Reliability:
    """How often a slice of pairs is ranked right, and how sure the model was.

    Args:
        num_pairs: of the slice.
        accuracy: share ranked right, ties half; accuracy_error is its standard error.
        confidence: mean chance of the side that is ahead, 0.5 to 1.
        ece: expected calibration error: mean gap of accuracy and confidence over ten bins of
            confidence, weighted by their pairs; 0 is perfect. With few pairs it is large by chance.
    """

    num_pairs: int
    accuracy: float
    accuracy_error: float
    confidence: float
    ece: float


def reliability(chances: Sequence[float]) -> Reliability:
    """Of pairs, by the chance that each one's chosen answer was given.

    Raises: ValueError if there is no pair.

    Example:
        >>> reliability([0.75, 0.75, 0.75, 0.25]).ece
        0.0
    """
    if not chances:
        raise ValueError("reliability: no pairs, expected one or more")
    rights = [0.5 if chance == 0.5 else float(chance > 0.5) for chance in chances]
    sures = [max(chance, 1 - chance) for chance in chances]
    bins: dict[int, list[int]] = {}
    for place, sure in enumerate(sures):
        bins.setdefault(min(int((sure - 0.5) * 2 * NUM_BINS), NUM_BINS - 1), []).append(place)
    gaps = [abs(sum(rights[i] - sures[i] for i in members)) for members in bins.values()]
    count = len(chances)
    accuracy = sum(rights) / count
    return Reliability(
        num_pairs=count,
        accuracy=accuracy,
        accuracy_error=math.sqrt(accuracy * (1 - accuracy) / count),
        confidence=sum(sures) / count,
        ece=sum(gaps) / count,
    )


def by_slice(
    chances: Sequence[float], keys: Sequence[str], order: Callable[[str], object] | None = None
) -> dict[str, Reliability]:
    """Reliability of the pairs of each key.

    Args:
        keys: one a pair.
        order: sort key of the slices; None sorts by name.

    Example:
        >>> {k: v.num_pairs for k, v in by_slice([0.9, 0.8, 0.2], ["b", "a", "b"]).items()}
        {'a': 1, 'b': 2}
    """
    groups: dict[str, list[float]] = {}
    for chance, key in zip(chances, keys, strict=True):
        groups.setdefault(key, []).append(chance)
    names: Mapping[str, object] = {name: order(name) if order else name for name in groups}
    ordered = sorted(groups, key=lambda name: (str(names[name]), name))
    return {name: reliability(groups[name]) for name in ordered}
