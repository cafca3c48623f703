"""Kind `eval`: measures the policy it starts from and trains nothing.

For measurements that are too long to repeat after every stage; the recipe's own `evals` run on
every policy without a stage of this kind.
"""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field

from align.course import Job, Outcome
from align.evals import EvalConfig, run_eval


class EvalStageConfig(BaseModel):
    """Which evals to run once, on one policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    measure: tuple[EvalConfig, ...] = Field(min_length=1)
    """Evals, each with a name of its own; there is no parent to compare with."""
    seed: int = Field(default=0, ge=0)
    """Of the rows drawn and of the sampling."""


def run(config: EvalStageConfig, job: Job) -> Outcome:
    """Runs the evals on job.start in the main process; results go to job.artifact/evals.json.

    Returns: `<name>` and `<name>_stderr` of every eval as metrics; () elsewhere than in the main
        process.
    """
    if not job.accelerator.is_main_process:
        return Outcome({})
    results = [
        run_eval(
            eval_config,
            policy=job.start,
            parent=None,
            inputs=job.inputs,
            base=job.base,
            seed=job.seed,
        )
        for eval_config in config.measure
    ]
    text = json.dumps([json.loads(result.to_json()) for result in results], indent=1)
    (job.artifact / "evals.json").write_text(text + "\n", encoding="utf-8")
    values = {result.name: result.value for result in results}
    return Outcome(values | {f"{result.name}_stderr": result.stderr for result in results})
