"""Signals to dimensions to one score, as a pure function of a declared tree.

    signal     a rule's verdict where the item names one of its rules, else sigmoid(head)
    dimension  weighted mean of its signals that have a verdict, 0 where the response holds what one
               of them forbids                                              (all in [0, 1])
    score      mean of the dimensions, weighted by the gate; then floors

Four laws hold the score together. A rule overrules a head. A head without a verdict is left out,
never read as 0. A rule that applies but gives no verdict leaves the item without a score, because
what remains would not compare with the rest of its group. A dimension below its floor caps the
score at its own value, and one above its ceiling counts as the ceiling: beyond "harmless enough"
only the other dimensions decide, so that refusing everything does not win.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward.types import Score, Verdict
from reward.verifiers import VERIFIERS

OVERALL = "overall"
SHOWN_CHARS = 60
DimensionName = Literal["correctness", "truthfulness", "helpfulness", "harmlessness"]


def rule_key(verifier: str) -> str:
    """Name under which a rule's verdict stands among an item's signals."""
    return f"rule:{verifier}"


def head_key(signal: str) -> str:
    """Name under which a reward model's head stands among an item's signals."""
    return f"head:{signal}"


def pattern_key(signal: str) -> str:
    """Name under which a forbidden pattern's verdict stands among an item's signals."""
    return f"pattern:{signal}"


class Signal(BaseModel):
    """One thing that is judged: by rules, by a head of the reward model, or by either."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    weight: float = Field(default=1.0, gt=0)
    """Share in its dimension, relative to the other signals that have a verdict."""
    verifiers: tuple[str, ...] = Field(default=(), strict=False)
    """Rules that overrule the head where the item names one of them."""
    head: bool = True
    """Whether the reward model has a head for it, trained by the pairs labelled with its name."""
    forbidden: tuple[str, ...] = Field(default=(), strict=False)
    """Regular expressions, case ignored; where a response holds one its dimension is 0."""
    criterion: str = ""
    """What is asked, in words; for people, and for a judge model."""

    @model_validator(mode="after")
    def _judged(self) -> Self:
        for pattern in self.forbidden:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"forbidden = {pattern!r} is no regular expression: {error}"
                ) from error
        unknown = sorted(set(self.verifiers) - set(VERIFIERS))
        if unknown:
            raise ValueError(
                f"verifiers = {', '.join(unknown)}, expected some of {', '.join(sorted(VERIFIERS))}"
            )
        if not self.head and not self.verifiers and not self.forbidden:
            raise ValueError("head = false and verifiers = [] leave no judge; give one of them")
        return self

    def forbids(self, response: str) -> str:
        """The first text of the response that is forbidden, or ""."""
        found = (re.search(pattern, response, re.IGNORECASE) for pattern in self.forbidden)
        return next((match[0] for match in found if match), "")


class Dimension(BaseModel):
    """A weighted mean of signals."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    signals: dict[str, Signal] = Field(min_length=1)
    """Signals by name; a name stands in one dimension only."""
    weight: float = Field(default=1.0, gt=0)
    """Declared share in the score; a learned gate starts from it."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Below this value the dimension caps the score at its own value; 0 never caps."""
    ceiling: float = Field(default=1.0, gt=0, le=1)
    """Above this value the dimension counts as this much."""
    max_share: float = Field(default=1.0, gt=0, le=1)
    """Largest share the gate may give it while another dimension applies."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.floor > self.ceiling:
            raise ValueError(f"floor = {self.floor:g}, expected at most ceiling = {self.ceiling:g}")
        return self

    @property
    def head_shares(self) -> dict[str, float]:
        """Share of each of its heads in the mean of them all; empty if rules alone judge it."""
        heads = {name: signal.weight for name, signal in self.signals.items() if signal.head}
        return {name: weight / sum(heads.values()) for name, weight in heads.items()}


class Hierarchy(BaseModel):
    """The declared tree.

    Example:
        >>> score = HIERARCHY.score({"rule:math": Verdict(1.0), "head:correctness": Verdict(-9.0)})
        >>> score.value, dict(score.dimensions)
        (1.0, {'correctness': 1.0})
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = "default"
    """Stands in the version of every score."""
    dimensions: dict[DimensionName, Dimension] = Field(min_length=1)
    """Dimensions by name, in the order of the gate."""
    gate: Literal["declared", "learned"] = "declared"
    """Who weighs the dimensions: the weights above, or a head that reads the prompt. Pairs labelled
    `overall` train the heads under declared weights, and a learned gate alone."""

    @model_validator(mode="after")
    def _one_place_each(self) -> Self:
        signals = [name for dimension in self.dimensions.values() for name in dimension.signals]
        rules = [
            rule
            for dimension in self.dimensions.values()
            for signal in dimension.signals.values()
            for rule in signal.verifiers
        ]
        for kind, names in (("signal", signals), ("verifier", rules)):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{kind} {', '.join(twice)} stands twice; keep it in one place")
        if OVERALL in signals:
            raise ValueError("signal 'overall' is the name of the whole score; choose another name")
        return self

    @property
    def heads(self) -> tuple[str, ...]:
        """Signals that a reward model has heads for, in tree order."""
        return tuple(
            name
            for dimension in self.dimensions.values()
            for name, signal in dimension.signals.items()
            if signal.head
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """What a pair's label may speak about: a head, a dimension, or the whole score.

        A name that is a head's and a dimension's means the head.

        Example:
            >>> HIERARCHY.labels
            ('correctness', 'constraints', 'style', 'harmlessness', 'helpfulness', 'overall')
        """
        dimensions = (
            name
            for name, dimension in self.dimensions.items()
            if dimension.head_shares and name not in self.heads
        )
        return (*self.heads, *dimensions, OVERALL)

    def phase(self, label: str) -> int:
        """0 for a label of one head, 1 of a dimension, 2 of the whole score.

        Example:
            >>> [HIERARCHY.phase(label) for label in ("style", "helpfulness", "overall")]
            [0, 1, 2]
        """
        return 0 if label in self.heads else 2 if label == OVERALL else 1

    @property
    def version(self) -> str:
        """Name and digest of the tree: two trees with one version are one tree.

        Example:
            >>> HIERARCHY.version.split("@")[0], len(HIERARCHY.version.split("@")[1])
            ('default', 12)
        """
        # The order of the dimensions is kept: a learned gate is read by it.
        text = json.dumps(self.model_dump(mode="json"))
        return f"{self.name}@{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def patterns(self, response: str) -> dict[str, Verdict]:
        """Verdicts of the forbidden patterns that a response holds, by `pattern_key`."""
        found = {
            name: signal.forbids(response)
            for dimension in self.dimensions.values()
            for name, signal in dimension.signals.items()
        }
        return {
            pattern_key(name): Verdict(0.0, reason=f"forbidden: {text[:SHOWN_CHARS]!r}")
            for name, text in found.items()
            if text
        }

    def score(
        self, signals: Mapping[str, Verdict], gate: Mapping[str, float] | None = None
    ) -> Score:
        """One score of an item, with everything it was made of.

        Args:
            signals: verdicts by `rule_key` and `pattern_key` (in [0, 1]), and by `head_key` (any
                real number).
            gate: weight of each dimension, >= 0, from the reward model; None takes the declared
                ones.

        Raises: ValueError for a signal that the tree does not hold, a rule outside [0, 1], a value
            that is not finite, or a gate that does not weigh the tree's dimensions.

        Example:
            >>> HIERARCHY.score({"rule:math": Verdict(0.0, valid=False, reason="timed out")}).reason
            'math: timed out'
        """
        self._check(signals)
        dimensions: dict[DimensionName, float] = {}
        for name, dimension in self.dimensions.items():
            try:
                value = _dimension_value(dimension, signals)
            except _NoVerdictError as error:
                return self._unknown(signals, str(error))
            if value is not None:
                dimensions[name] = value
        if not dimensions:
            return self._unknown(signals, "no signal has a verdict")
        shares = self._shares(dimensions, gate)
        total = sum(
            shares[name] * min(value, self.dimensions[name].ceiling)
            for name, value in dimensions.items()
        )
        caps = [
            (value, name)
            for name, value in dimensions.items()
            if value < self.dimensions[name].floor
        ]
        lowest, culprit = min(caps, default=(math.inf, ""))
        return Score(
            value=min(total, lowest),
            dimensions={str(name): value for name, value in dimensions.items()},
            signals=dict(signals),
            reason=f"capped: {culprit} {lowest:.3f} is below its floor" if lowest < total else "",
            version=self.version,
        )

    def _unknown(self, signals: Mapping[str, Verdict], reason: str) -> Score:
        return Score(0.0, signals=dict(signals), valid=False, reason=reason, version=self.version)

    def _check(self, signals: Mapping[str, Verdict]) -> None:
        every = [signal for d in self.dimensions.values() for signal in d.signals.values()]
        rules = {rule_key(rule) for signal in every for rule in signal.verifiers}
        rules |= {
            pattern_key(name)
            for dimension in self.dimensions.values()
            for name, signal in dimension.signals.items()
            if signal.forbidden
        }
        heads = {head_key(name) for name in self.heads}
        for name, verdict in signals.items():
            if name not in rules | heads:
                raise ValueError(
                    f"signal {name!r} is not in hierarchy {self.name!r}, which holds "
                    f"{', '.join(sorted(rules | heads))}; declare it in one dimension"
                )
            good = math.isfinite(verdict.value) and (name in heads or 0 <= verdict.value <= 1)
            if verdict.valid and not good:
                expected = "a finite number" if name in heads else "0 to 1"
                raise ValueError(f"signal {name!r} = {verdict.value}, expected {expected}")

    def _shares(
        self, dimensions: Mapping[DimensionName, float], gate: Mapping[str, float] | None
    ) -> dict[DimensionName, float]:
        """Gate over the dimensions that apply, summing to 1, none above its max_share."""
        if gate is not None and set(gate) != set(self.dimensions):
            raise ValueError(
                f"gate weighs {', '.join(sorted(gate)) or 'nothing'}, expected exactly "
                f"{', '.join(sorted(self.dimensions))}"
            )
        raw = {n: self.dimensions[n].weight if gate is None else gate[n] for n in dimensions}
        total = sum(raw.values())
        if not (all(w >= 0 and math.isfinite(w) for w in raw.values()) and total > 0):
            raise ValueError(f"gate = {raw}, expected finite weights >= 0, not all 0")
        return _limited(raw, {name: self.dimensions[name].max_share for name in raw})


def _limited(
    weights: Mapping[DimensionName, float], limits: Mapping[DimensionName, float]
) -> dict[DimensionName, float]:
    """Weights as shares of 1, none above its limit; where all are at theirs, the limits decide."""
    fixed: dict[DimensionName, float] = {}
    while free := {name: weight for name, weight in weights.items() if name not in fixed}:
        rest, total = 1 - sum(fixed.values()), sum(free.values())
        shares = {n: rest * (w / total if total else 1 / len(free)) for n, w in free.items()}
        over = {n: limits[n] for n, share in shares.items() if share > limits[n]}
        if not over:
            return {**fixed, **shares}
        fixed |= over
    total = sum(fixed.values())
    return {name: limit / total for name, limit in fixed.items()}


class _NoVerdictError(Exception):
    """A rule applies to the item and gave no verdict."""


def _dimension_value(dimension: Dimension, signals: Mapping[str, Verdict]) -> float | None:
    if any(pattern_key(name) in signals for name in dimension.signals):
        # One criterion broken outright is not made good by the others.
        return 0.0
    total = weights = 0.0
    for name, signal in dimension.signals.items():
        value = _signal_value(name, signal, signals)
        if value is not None:
            total += signal.weight * value
            weights += signal.weight
    return total / weights if weights else None


def _signal_value(name: str, signal: Signal, signals: Mapping[str, Verdict]) -> float | None:
    rules = [(r, signals[rule_key(r)]) for r in signal.verifiers if rule_key(r) in signals]
    for rule, verdict in rules:
        if not verdict.valid:
            raise _NoVerdictError(f"{rule}: {verdict.reason or 'no verdict'}")
    if rules:
        return sum(verdict.value for _, verdict in rules) / len(rules)
    head = signals.get(head_key(name))
    return sigmoid(head.value) if head is not None and head.valid else None


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), without overflow.

    Example:
        >>> sigmoid(0.0), sigmoid(-1e4)
        (0.5, 0.0)
    """
    small = math.exp(-abs(value))
    return (1.0 if value >= 0 else small) / (1 + small)


HIERARCHY = Hierarchy(
    dimensions={
        "correctness": Dimension(
            signals={
                "correctness": Signal(verifiers=("code", "exact", "facts", "math", "retrieval"))
            },
            weight=0.5,
        ),
        "helpfulness": Dimension(
            signals={
                "constraints": Signal(
                    weight=0.5,
                    verifiers=("constraints", "json", "language", "length", "repetition"),
                ),
                "style": Signal(weight=0.5),
            },
            weight=0.3,
        ),
        "harmlessness": Dimension(
            signals={"harmlessness": Signal()},
            weight=0.2,
            floor=0.3,
            ceiling=0.9,
            max_share=0.5,
        ),
    }
)
"""The tree that a recipe gets when it declares none; truthfulness has no default judge yet."""
