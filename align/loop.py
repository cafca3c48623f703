"""One training loop on accelerate for every stage kind."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from align.course import Course, Job
from align.lora import LoraConfig
from align.optim import OptimConfig


class TrainConfig(BaseModel):
    """What every stage that updates weights has in common; each kind's config extends it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence_tokens: int = Field(default=8192, ge=2)
    """Capacity of one packed sequence in tokens; no row may be longer."""
    batch_sequences: int = Field(default=128, ge=1)
    """Packed sequences per optimizer step, over all processes."""
    micro_sequences: int = Field(default=1, ge=1)
    """Packed sequences per forward pass of one process; changes memory, not the result."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the data; not used when max_steps is set."""
    max_steps: int = Field(default=0, ge=0)
    """Optimizer steps of the run; 0 means as many as the epochs make."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    lora: LoraConfig | None = None
    """Adapters to train instead of the weights; absent means full training."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the forward and backward pass; trained weights and their updates stay fp32."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""
    save_every_steps: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 writes none."""
    keep_checkpoints: int = Field(default=1, ge=1)
    """Newest checkpoints kept on disk."""
    log_every_steps: int = Field(default=1, ge=1)
    """Steps per line of metrics.jsonl."""
    seed: int = Field(default=0, ge=0)
    """Of the stage: order of the rows, dropout, new adapters."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers fed beside metrics.jsonl."""
    backend: Literal["native", "trl"] = "native"
    """Whose trainer runs the stage."""


def train(course: Course, model: nn.Module, *, config: TrainConfig, job: Job) -> dict[str, float]:
    """Trains `model` in place along `course`; resumes from job.folder/checkpoints if there is one.

    Args:
        course: what the kind does at each step.
        model: policy or reward model, possibly wrapped by peft; parameters that require a
            gradient are trained.
        config: optimizer, precision, checkpoints, logs.
        job: folder, seed and accelerator.

    Returns: final metrics: loss of the last step, counters and whatever the losses measured.
    """
    raise RuntimeError("train() is being written; its signature is final")
