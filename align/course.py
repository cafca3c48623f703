"""What a stage kind gives the one training loop, and what the roof gives a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

from align.data.batch import Batch
from align.losses.types import Loss
from reward.sandbox import SandboxConfig


@dataclass(frozen=True)
class Step:
    """What one optimizer update of one rank is made of: microbatches, and what making them told."""

    batches: tuple[Batch, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


class Course(Protocol):
    """What differs between stage kinds; `align.loop.train` is blind to the rest.

    `step(index)` is a function of the seed and the index alone where rows are fixed, so a resumed
    run needs only the index; a course that samples (grpo) keeps the rest in its state.
    """

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run; known before the first."""
        ...

    def step(self, index: int) -> Step:
        """This rank's share of optimizer step `index`, 0-based."""
        ...

    def count(self, batch: Batch) -> float:
        """What this microbatch adds to the global denominator; needs no model."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Loss: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Job:
    """Where a stage works and what it starts from; made by the runner, one per stage.

    Args:
        name: the stage's name in the recipe.
        folder: the stage's own folder: checkpoints/ and metrics.jsonl live here.
        artifact: temporary folder that the stage fills with weights or adapter and tokenizer; the
            runner adds the manifest and publishes it in one rename.
        start: artifact folder of the policy to start from.
        inputs: artifact folders of other stages by the role they play ("reward", "pairs", ...).
        base: folder that relative data paths are resolved against.
        seed: of this stage.
        accelerator: owns devices, processes and precision.
        sandbox: how programs that a policy wrote are run.
        reward_url: scoring service that judges in place of a reward artifact; "" for none.
        reward_key: its key; "" sends none.
    """

    name: str
    folder: Path
    artifact: Path
    start: Path
    base: Path
    seed: int
    accelerator: Accelerator
    inputs: Mapping[str, Path] = field(default_factory=dict)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    reward_url: str = ""
    reward_key: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a finished stage says for its manifest.

    Args:
        metrics: final numbers by name.
        data: one entry per data source: name, place, licence, rows, tokens.
    """

    metrics: Mapping[str, float]
    data: tuple[Mapping[str, Any], ...] = ()
