"""Retrieval from long contexts: a fact in filler text (needle), several, or one of many keys."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.data.sources import DataConfig
from align.evals.sampling import SampledEval, accuracy
from align.evals.types import Context, EvalResult


class NeedleEval(SampledEval):
    """Mean verdict on what was retrieved; several needles give partial credit."""

    kind: Literal["needle", "multi_needle", "recall"] = "needle"
    """Discriminator, and the procedural task that makes the prompts."""

    context_tokens: int = Field(default=512, ge=32)
    """Length of each prompt in tokens, about."""

    num_items: int = Field(default=200, ge=2)
    """Held-out prompts."""


def run(config: NeedleEval, context: Context) -> EvalResult:
    """Accuracy of the policy at this context length."""
    source = DataConfig(
        task=config.kind,
        split="dev",
        num_rows=config.num_items,
        context_tokens=config.context_tokens,
    )
    name = config.name or f"{config.kind}@{config.context_tokens}"
    return accuracy(config, (source,), name=name, context=context)
