"""Arithmetic word problems, answers checked as numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.data.sources import DataConfig
from align.evals.held_out import HeldOut
from align.evals.sampling import SampledEval, accuracy
from align.evals.types import Context, EvalResult


class MathEval(SampledEval):
    """Mean verdict on word problems."""

    kind: Literal["math"] = "math"
    """Discriminator."""

    data: tuple[HeldOut, ...] = Field(
        default=(DataConfig(task="arithmetic", split="dev", num_rows=400),), min_length=1
    )
    """Problems; the procedural ones unless told otherwise."""


def run(config: MathEval, context: Context) -> EvalResult:
    """Accuracy of the policy."""
    return accuracy(config, config.data, name=config.name or "math", context=context)
