"""What an eval is given and what it says: one number with its error, and the items behind it.

The items stay in the order of the held-out rows, so two policies judged by one config and one seed
are compared item by item: the error of a paired difference is what is left when the difficulty of
each row has cancelled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from reward.sandbox import SandboxConfig


class EvalBase(BaseModel):
    """What every kind of eval has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    """Name in tables; empty: the kind with what tells it from its sisters, as in `needle@512`."""

    @property
    def is_relative(self) -> bool:
        """Whether the eval already compares a policy with its parent.

        Such an eval says what one stage did, so it runs on the stages that aim at it only.
        """
        return False


@dataclass(frozen=True)
class Context:
    """Whom an eval judges and what it may read.

    Args:
        policy: artifact folder of the policy (or reward model) under judgement.
        parent: artifact folder of what it was trained from; None for a first stage.
        inputs: artifact folders of other stages by role ("reward", ...).
        base: folder that relative data paths are resolved against.
        seed: of the rows drawn and of the sampling; the same for every policy compared.
        sandbox: how programs that a policy wrote are run.
    """

    policy: Path
    parent: Path | None
    inputs: Mapping[str, Path]
    base: Path
    seed: int
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)


@dataclass(frozen=True)
class EvalResult:
    """One number about one policy.

    Args:
        name: as in tables.
        metric: what the value is: "accuracy", "nll", "win_rate", ...
        value: mean of the valid items.
        stderr: standard error of the value; 0 with fewer than two valid items.
        num_items: rows judged, the ones without a verdict included.
        items: one number per row, in row order; NaN where the judge gave no verdict.
        higher_is_better: False for losses.
        details: further numbers by name ("unfinished", "accuracy/style", ...).
        baseline: for evals that already compare with the parent: the value that means "no
            different from it"; None for evals of one policy alone.

    Example:
        >>> result = EvalResult.from_items("math", "accuracy", [1.0, 0.0, 1.0, 1.0])
        >>> result.value, round(result.stderr, 3), result.num_items
        (0.75, 0.25, 4)
    """

    name: str
    metric: str
    value: float
    stderr: float
    num_items: int
    items: tuple[float, ...]
    higher_is_better: bool = True
    details: Mapping[str, float] = field(default_factory=dict)
    baseline: float | None = None

    @classmethod
    def from_items(
        cls,
        name: str,
        metric: str,
        items: Sequence[float],
        *,
        baseline: float | None = None,
        details: Mapping[str, float] | None = None,
    ) -> EvalResult:
        """Mean and standard error of the items that have a verdict.

        Raises:
            ValueError: if no item has one.
        """
        valid = [item for item in items if not math.isnan(item)]
        if not valid:
            raise ValueError(
                f"eval {name}: none of {len(items)} items has a verdict; "
                "check that its rows name a verifier and a right answer"
            )
        value, stderr = mean_and_stderr(valid)
        return cls(
            name=name,
            metric=metric,
            value=value,
            stderr=stderr,
            num_items=len(items),
            items=tuple(items),
            baseline=baseline,
            details={**(details or {}), "no_verdict": float(len(items) - len(valid))},
        )

    def to_json(self) -> str:
        """One line of strict JSON; items without a verdict are null.

        Example:
            >>> result = EvalResult.from_items("math", "accuracy", [1.0, float("nan")])
            >>> EvalResult.from_json(result.to_json()).num_items
            2
        """
        values = asdict(self)
        values["items"] = [None if math.isnan(item) else item for item in self.items]
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> EvalResult:
        """The result that `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        items = tuple(math.nan if item is None else float(item) for item in values.pop("items"))
        return cls(items=items, **values)


@dataclass(frozen=True)
class Change:
    """How a value moved between two policies on the same items.

    Args:
        value: after minus before, in the metric's own unit.
        stderr: of that difference, paired item by item.
        num_items: items with a verdict on both sides.
        is_gain, is_loss: moved the good or the bad way by more than two standard errors.
    """

    value: float
    stderr: float
    num_items: int
    is_gain: bool
    is_loss: bool


def compare(before: EvalResult | None, after: EvalResult) -> Change:
    """How a stage moved an eval: paired with the parent's result, or against the baseline.

    Args:
        before: the parent's result of the same eval; not read if `after` has a baseline.
        after: the stage's own result.

    Raises:
        ValueError: if the two are not the same eval on equally many items, share no item with a
            verdict, or `before` is missing where it is needed.

    Example:
        >>> old = EvalResult.from_items("math", "accuracy", [0.0, 0.0, 1.0, 0.0])
        >>> new = EvalResult.from_items("math", "accuracy", [1.0, 1.0, 1.0, 1.0])
        >>> compare(old, new).is_gain
        True
    """
    if after.baseline is not None:
        olds = (after.baseline,) * after.num_items
    elif before is None:
        raise ValueError(f"eval {after.name}: a change needs the parent's result; run it first")
    elif _key(before) != _key(after):
        raise ValueError(
            f"cannot compare {before.name} ({before.metric}, {before.num_items} items) with "
            f"{after.name} ({after.metric}, {after.num_items} items); "
            "run both policies with one config and one seed"
        )
    else:
        olds = before.items
    gaps = [new - old for old, new in zip(olds, after.items, strict=True)]
    differences = [gap for gap in gaps if not math.isnan(gap)]
    if not differences:
        raise ValueError(f"eval {after.name}: no item has a verdict for both policies")
    value, stderr = mean_and_stderr(differences)
    moved = value if after.higher_is_better else -value
    return Change(value, stderr, len(differences), moved > 2 * stderr, -moved > 2 * stderr)


def _key(result: EvalResult) -> tuple[str, str, int]:
    return result.name, result.metric, result.num_items


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and sample standard deviation over the square root of the count.

    Example:
        >>> mean_and_stderr([2.0, 4.0])
        (3.0, 1.0)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def pick_device() -> str:
    """The accelerator if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
