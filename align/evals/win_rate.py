"""Whose answers are better, the policy's or its parent's?

Both answer the same held-out prompts with the same sampling seeds; a judge scores each answer
alone. Win 1, tie 0.5, loss 0: a policy that learned nothing has 0.5 exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from align.data.rows import PromptRow
from align.evals.held_out import HeldOut, read_held_out
from align.evals.reward_artifact import open_scorer
from align.evals.sampling import Answers, SampledEval, respond, verdicts
from align.evals.types import Context, EvalResult
from align.prompts import judge

BASELINE = 0.5


class WinRateEval(SampledEval):
    """Share of prompts on which the policy beats its parent, ties counted half."""

    kind: Literal["win_rate"] = "win_rate"
    """Discriminator."""

    data: tuple[HeldOut, ...] = Field(min_length=1)
    """Held-out prompts."""

    judge: Literal["verifier", "reward"] = "verifier"
    """`verifier`: each prompt's own rule; `reward`: the stage's reward model and hierarchy."""

    @property
    def is_relative(self) -> bool:
        return True


def run(config: WinRateEval, context: Context) -> EvalResult:
    """Win rate over the parent; 0.5 without generating for a policy that has none.

    Raises:
        ValueError: if judge is `reward` and the stage has no reward artifact.
    """
    name = config.name or "win_rate"
    rows, details = read_held_out(config.data, PromptRow, kind="prompt", name=name, context=context)
    if context.parent is None:
        ties = [BASELINE] * len(rows)
        return EvalResult.from_items(name, "win_rate", ties, baseline=BASELINE, details=details)
    sides = []
    for folder in (context.policy, context.parent):
        answers = respond(folder, rows, config=config, seed=context.seed)
        sides.append(score(rows, answers, config=config, name=name, context=context))
    items = [duel(mine, theirs) for mine, theirs in zip(*sides, strict=True)]
    return EvalResult.from_items(name, "win_rate", items, baseline=BASELINE, details=details)


def duel(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Mean outcome over the samples of one prompt; NaN scores are left out.

    Example:
        >>> duel([1.0, 0.5, 0.0], [0.0, 0.5, 1.0]), duel([float("nan")], [1.0])
        (0.5, nan)
    """
    outcomes = [
        0.5 if my == their else float(my > their)
        for my, their in zip(mine, theirs, strict=True)
        if not math.isnan(my) and not math.isnan(their)
    ]
    return sum(outcomes) / len(outcomes) if outcomes else math.nan


def score(
    rows: Sequence[PromptRow],
    answers: Answers,
    *,
    config: WinRateEval,
    name: str,
    context: Context,
) -> list[list[float]]:
    """[rows][samples] what the judge gives each answer; NaN where it gives nothing."""
    if config.judge == "verifier":
        judged = verdicts(rows, answers, name=name, sandbox=context.sandbox)
        return [[v.value if v.valid else math.nan for v in row] for row in judged]
    if "reward" not in context.inputs:
        raise ValueError(
            f"eval {name}: judge = 'reward' needs a reward artifact; name a reward stage with "
            "`reward:` or use judge: verifier"
        )
    scorer = open_scorer(context.inputs["reward"], context.sandbox)
    size = config.num_samples
    asked = [row for row in rows for _ in range(size)]
    texts = [text for row in answers.texts for text in row]
    scores = judge(asked, texts, tokenizer=answers.tokenizer, scorer=scorer)
    values = [score.value if score.valid else math.nan for score in scores]
    return [values[i : i + size] for i in range(0, len(values), size)]
