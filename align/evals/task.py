"""Accuracy on held-out prompts of any kind, judged by each prompt's own verifier."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.evals.held_out import HeldOut
from align.evals.sampling import SampledEval, accuracy
from align.evals.types import Context, EvalResult


class TaskEval(SampledEval):
    """Mean verdict on sampled answers (avg@num_samples)."""

    kind: Literal["task"] = "task"
    """Discriminator."""

    data: tuple[HeldOut, ...] = Field(min_length=1)
    """Prompts with right answers; procedural sources must be `split: dev`."""


def run(config: TaskEval, context: Context) -> EvalResult:
    """Accuracy of the policy; details hold it per task where there are several."""
    named = "+".join(source.task for source in config.data if source.task)
    name = config.name or (named or "task")
    return accuracy(config, config.data, name=name, context=context)
