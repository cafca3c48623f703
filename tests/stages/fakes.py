"""Stage kinds that count instead of training, for the laws of the runner; the command itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from typer.testing import CliRunner, Result

from align.course import Job, Outcome
from align.data.sources import DataConfig
from align.data.tokenizer import train_tokenizer
from align.evals.types import EvalResult
from reward.sandbox import SandboxConfig
from stages.cli import app
from stages.recipe import Kind, ModelConfig, Recipe, load_recipe
from stages.runner import Ground

TOKENIZER = train_tokenizer(["what is two and three? five, of course, said the cat"] * 4, 290)


class FakeOptim(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    lr: float = Field(default=1e-5, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"


class FakeConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    seed: int = 0
    epochs: int = Field(default=1, ge=1)
    optim: FakeOptim = FakeOptim()
    data: tuple[DataConfig, ...] = ()
    fail_at: int = 0
    make: Literal["", "dpo", "sft"] = ""


class TaskFake(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["task"] = "task"
    name: str
    judge: Literal["verifier", "reward"] = "verifier"
    num_items: int = 4
    data: tuple[DataConfig, ...] = ()
    is_relative: bool = False


class PairFake(TaskFake):
    kind: Literal["pair"] = "pair"  # type: ignore[assignment]


FakeEval = Annotated[TaskFake | PairFake, Field(discriminator="kind")]


def run_fake(config: FakeConfig, job: Job) -> Outcome:
    """Writes `weights`: the parent's, one letter more, and the learning rate; counts its steps."""
    checkpoints = job.folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    for step in range(len(list(checkpoints.iterdir())) + 1, 4):
        if step == config.fail_at:
            raise RuntimeError(f"{job.name}: fails at step {step}")
        (checkpoints / str(step)).write_text("x")
        with (job.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
    parent = (job.start / "weights").read_text()
    judges = {role: (path / "weights").read_text() for role, path in job.inputs.items()}
    (job.artifact / "weights").write_text(f"{parent}>{config.optim.lr:g}{judges or ''}")
    return Outcome(metrics={"loss": 1.0}, data=({"name": "rows", "licence": "MIT"},))


def run_quiet(config: FakeConfig, job: Job) -> Outcome:
    """As `run_fake`, by one process while the others go on."""
    return run_fake(config, job) if job.accelerator.is_main_process else Outcome({})


KINDS = {
    "quiet": Kind(FakeConfig, run_quiet, gives="policy"),
    "lm": Kind(FakeConfig, run_fake, gives="policy"),
    "sft": Kind(FakeConfig, run_fake, gives="policy"),
    "reward": Kind(FakeConfig, run_fake, gives="reward"),
    "sample": Kind(FakeConfig, run_fake, gives="rows", takes_reward=True),
    "dpo": Kind(FakeConfig, run_fake, gives="policy"),
    "grpo": Kind(FakeConfig, run_fake, gives="policy", takes_reward=True),
}


def make_start(config: ModelConfig, temporary: Path, base: Path) -> Path:
    if config.path:
        return base / config.path
    (temporary / "weights").write_text(config.preset)
    return temporary


def run_eval(
    config: TaskFake,
    *,
    policy: Path,
    parent: Path | None,
    inputs: dict,
    base: Path,
    seed: int,
    sandbox: SandboxConfig,
) -> EvalResult:
    """The longer the ladder behind the policy, the better."""
    depth = (policy / "weights").read_text().count(">")
    items = [depth + 0.01 * index for index in range(config.num_items)]
    return EvalResult.from_items(config.name, "depth", items)


def load(file: Path, *sets: str) -> Recipe:
    return load_recipe(file, sets, kinds=KINDS, eval_config=FakeEval)


def ground(tmp_path: Path, said: list[str] | None = None) -> Ground:
    return Ground(
        run=tmp_path / "run",
        base=tmp_path,
        accelerator=Accelerator(cpu=True),
        run_eval=run_eval,
        make_start=make_start,
        say=(lambda line: None) if said is None else said.append,
    )


def align(*arguments: str) -> Result:
    """The command `align` with these arguments, in this process."""
    return CliRunner().invoke(app, list(arguments))


LADDER = """\
name: fake
vars: {lr: 1e-5, root: data}
model: {preset: tiny, tokenizer: {data: [{task: arithmetic}]}}
evals:
  - {name: depth, kind: task}
  - {name: judged, kind: task, judge: reward}
  - {name: pairs-held-out, kind: pair}
stages:
  - name: sft-short
    kind: sft
    optim: {lr: "${lr}"}
    evals: [depth]
  - {name: sft-long, kind: sft, from: sft-short}
  - {name: reward, kind: reward, from: sft-short, evals: [pairs-held-out]}
  - {name: pairs, kind: sample, from: sft-long, reward: reward, make: dpo}
  - {name: dpo-short, kind: dpo, from: sft-long, data: [{from: pairs}], evals: [judged]}
  - {name: grpo, kind: grpo, from: dpo-short, reward: reward}
"""
