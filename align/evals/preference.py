"""Held-out preference pairs: which of two given answers does the model prefer?

For a policy, by its log-probabilities against its parent's, as in DPO:
margin = (log pi(chosen) - log pi(rejected)) - (log ref(chosen) - log ref(rejected)), in nats.
For a reward model, by the score of the head that the pair's label speaks about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from align.data.batch import Pair
from align.data.render import render_preference
from align.data.rows import PreferenceRow
from align.evals.held_out import HeldOut, read_held_out
from align.evals.likelihood import example_logprobs
from align.evals.reward_artifact import is_reward, open_tokenizer, pair_margins
from align.evals.types import Context, EvalBase, EvalResult, pick_device
from align.policy import load_policy

BASELINES = {"accuracy": 0.5, "margin": 0.0}


class PreferenceEval(EvalBase):
    """Share of pairs, or nats, by which the chosen answer is preferred."""

    kind: Literal["preference"] = "preference"
    """Discriminator."""

    data: tuple[HeldOut, ...] = Field(min_length=1)
    """Held-out preference pairs."""

    metric: Literal["accuracy", "margin"] = "accuracy"
    """`accuracy`: share of pairs with a positive margin, ties half; `margin`: its mean."""

    reference: Literal["parent", "none"] = "parent"
    """What a policy's log-probabilities are measured against; a reward model needs nothing."""

    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens per forward pass; changes memory, not the result."""

    @property
    def is_relative(self) -> bool:
        return self.reference == "parent"


def run(config: PreferenceEval, context: Context) -> EvalResult:
    """Accuracy or margin over all pairs; details hold it per signal.

    A policy without a parent is its own reference: every margin is 0.

    Raises:
        ValueError: if a row is no preference or there are fewer than two.
    """
    name = config.name or "preference"
    rows, details = read_held_out(
        config.data, PreferenceRow, kind="preference", name=name, context=context
    )
    margins, is_relative = _margins(rows, config=config, context=context)
    items = margins if config.metric == "margin" else [_win(margin) for margin in margins]
    groups: dict[str, list[float]] = {}
    for row, item in zip(rows, items, strict=True):
        groups.setdefault(row.signal, []).append(item)
    details |= {f"{config.metric}/{key}": sum(g) / len(g) for key, g in sorted(groups.items())}
    baseline = BASELINES[config.metric] if is_relative else None
    return EvalResult.from_items(name, config.metric, items, baseline=baseline, details=details)


def _win(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _margins(
    rows: Sequence[PreferenceRow], *, config: PreferenceEval, context: Context
) -> tuple[list[float], bool]:
    """One margin a pair, and whether they start from a baseline: the parent, or untrained heads."""
    if is_reward(context.policy):
        tokenizer = open_tokenizer(context.policy)
        pairs = [render_preference(row, tokenizer) for row in rows]
        return pair_margins(context.policy, pairs, batch_tokens=config.batch_tokens), True
    if config.reference == "none":
        return _leads(context.policy, rows, config.batch_tokens), False
    if context.parent is None:
        return [0.0] * len(rows), True
    mine = _leads(context.policy, rows, config.batch_tokens)
    theirs = _leads(context.parent, rows, config.batch_tokens)
    return [my - their for my, their in zip(mine, theirs, strict=True)], True


def _leads(folder: Path, rows: Sequence[PreferenceRow], batch_tokens: int) -> list[float]:
    """log p(chosen) - log p(rejected) of each pair under one policy, in nats."""
    model, tokenizer = load_policy(folder, device=pick_device())
    pairs: list[Pair] = [render_preference(row, tokenizer) for row in rows]
    examples = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
    sums = example_logprobs(model, examples, batch_tokens=batch_tokens)
    return [sums[i] - sums[i + 1] for i in range(0, len(sums), 2)]
