"""Instruction following: does an answer obey every checkable instruction of its prompt?

Prompt-level accuracy (`all_followed`) counts an answer only if all its instructions hold;
instruction-level accuracy is the mean share that holds. Both in the strict form of IFEval.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from align.data.rows import PromptRow
from align.data.sources import DataConfig
from align.evals.held_out import HeldOut, read_held_out
from align.evals.sampling import SampledEval, mean_valid, respond, verdicts
from align.evals.types import Context, EvalResult
from reward.types import Verdict


class ConstraintsEval(SampledEval):
    """Share of instructions, or of whole prompts, that are followed."""

    kind: Literal["constraints"] = "constraints"
    """Discriminator."""

    data: tuple[HeldOut, ...] = Field(
        default=(DataConfig(task="constraints", split="dev", num_rows=400),), min_length=1
    )
    """Prompts with the verifier `constraints`."""

    all_followed: bool = True
    """True: an answer counts 1 if every instruction holds, else 0; False: the share that holds."""


def run(config: ConstraintsEval, context: Context) -> EvalResult:
    """Accuracy of the policy; details hold the share of single instructions."""
    name = config.name or "constraints"
    rows, skipped = read_held_out(config.data, PromptRow, kind="prompt", name=name, context=context)
    answers = respond(context.policy, rows, config=config, seed=context.seed)
    judged = verdicts(rows, answers, name=name, sandbox=context.sandbox)
    shares = [mean_valid(row) for row in judged]
    whole = [mean_valid([_whole(verdict) for verdict in row]) for row in judged]
    valid = [share for share in shares if not math.isnan(share)]
    details = {"unfinished": answers.unfinished, **skipped}
    if valid:
        details["instructions"] = sum(valid) / len(valid)
    items = whole if config.all_followed else shares
    return EvalResult.from_items(name, "accuracy", items, details=details)


def _whole(verdict: Verdict) -> Verdict:
    return Verdict(float(verdict.value == 1.0), valid=verdict.valid)
