"""Evals: each a row of a report, one number with its error about one policy or reward model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field

from align.evals import constraints, lm, math, needle, preference, refusal, task, win_rate
from align.evals.reward_artifact import is_reward
from align.evals.types import Change, Context, EvalResult, compare
from reward.sandbox import SandboxConfig

__all__ = ["EVALS", "Change", "EvalConfig", "EvalResult", "compare", "run_eval"]

EvalConfig = Annotated[
    task.TaskEval
    | math.MathEval
    | constraints.ConstraintsEval
    | needle.NeedleEval
    | lm.LmEval
    | preference.PreferenceEval
    | refusal.RefusalEval
    | win_rate.WinRateEval,
    Field(discriminator="kind"),
]

# Any: each function takes the config of its own kind, which the discriminator has made sure of.
EVALS: Mapping[str, Callable[[Any, Context], EvalResult]] = MappingProxyType(
    {
        "task": task.run,
        "math": math.run,
        "constraints": constraints.run,
        "needle": needle.run,
        "multi_needle": needle.run,
        "recall": needle.run,
        "lm": lm.run,
        "preference": preference.run,
        "refusal": refusal.run,
        "win_rate": win_rate.run,
    }
)
# What a reward artifact can be asked; the rest needs a policy that writes.
FOR_REWARD = frozenset({"preference", "refusal"})


def run_eval(
    config: EvalConfig,
    *,
    policy: Path,
    parent: Path | None,
    inputs: Mapping[str, Path],
    base: Path,
    seed: int,
    sandbox: SandboxConfig | None = None,
) -> EvalResult:
    """What one eval says of one artifact.

    Args:
        policy: artifact folder of a policy, or of a reward model (recognised by its reward.json).
        parent: artifact folder of the policy it was trained from; None for a first stage.
        inputs: artifact folders of other stages by role: "reward" for judge: reward.
        base: folder that relative data paths are resolved against.
        seed: of rows and sampling; give every policy that is compared the same.
        sandbox: how programs are run; None takes the defaults.

    Raises:
        ValueError: if the artifact cannot be asked this, or its rows do not fit the kind.
    """
    if is_reward(policy) and config.kind not in FOR_REWARD:
        raise ValueError(
            f"eval {config.name or config.kind}: {policy} is a reward model, expected a policy; "
            f"ask a reward model only {', '.join(sorted(FOR_REWARD))}"
        )
    context = Context(policy, parent, inputs, base, seed, sandbox or SandboxConfig())
    return EVALS[config.kind](config, context)
