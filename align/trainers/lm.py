"""Kind `lm`: next-token training on plain text; also the course that SFT shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from pydantic import Field
from torch import nn
from transformers import PreTrainedTokenizerBase

from align import launches
from align.course import Course, Job, Outcome, Step
from align.data.batch import Batch
from align.data.loader import PackedData, place_of
from align.data.sources import DataConfig
from align.data.supply import Supplied, supply_texts
from align.launches import Launch
from align.loop import TrainConfig, train
from align.lora import apply_lora
from align.losses.lm import lm_loss
from align.losses.types import Loss
from align.policy import load_policy, save_policy
from model import HybridForCausalLM
from model.parallel.apply import parallelize
from model.parallel.mesh import open_mesh


class RowsConfig(TrainConfig):
    """Training on rows that are known beforehand."""

    data: tuple[DataConfig, ...] = Field(min_length=1)
    """Where the rows come from, and how much of each."""


class LmConfig(RowsConfig):
    """Next-token training on text rows, every token of which is trained."""

    backend: Literal["native"] = "native"
    """Whose trainer runs the stage; TRL has none for plain text."""


@dataclass(frozen=True)
class FixedCourse:
    """A course over rows that are known beforehand: each step is a function of its index.

    Args:
        ranks_per_row: neighbouring processes that compute the same rows together.

    Raises:
        ValueError: if an item alone would have no token for some of them.
    """

    data: PackedData
    accelerator: Accelerator
    ranks_per_row: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        short = min(self.data.lengths)
        if short < self.ranks_per_row:
            place = place_of(self.data.items[self.data.lengths.index(short)])
            raise ValueError(
                f"{place}: {short} tokens, expected one or more for each of parallel.sequence = "
                f"{self.ranks_per_row} processes; lower it or leave the row out"
            )

    @property
    def num_steps(self) -> int:
        return self.data.num_steps

    def step(self, index: int) -> Step:
        accelerator = self.accelerator
        rank = accelerator.process_index // self.ranks_per_row
        return Step(self.data.batches(index, rank, accelerator.num_processes // self.ranks_per_row))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise RuntimeError(
                f"checkpoint holds course state {sorted(state)}, expected none for fixed rows; "
                "it belongs to another kind of stage, move it aside"
            )


class LmCourse(FixedCourse):
    """Weighted next-token loss over packed examples; counts the weights."""

    def count(self, batch: Batch) -> float:
        return float(batch.weights.sum())

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        out = model(packed=batch.packed, targets=batch.targets)
        return lm_loss(out.logprobs, batch.weights, aux=out.aux_loss)


def open_start(config: TrainConfig, job: Job) -> tuple[HybridForCausalLM, PreTrainedTokenizerBase]:
    """The policy that a stage starts from, on the stage's device, shared as config.parallel says.

    Trained weights are as optim.weights says; the frozen base under an adapter may be bf16.

    Raises:
        ValueError: if no policy stands there, it cannot be shared so, or fp64 is asked of a GPU.
    """
    is_frozen = config.lora is not None and config.precision == "bf16"
    dtype = torch.bfloat16 if is_frozen else config.weights_dtype
    accelerator, parallel = job.accelerator, config.parallel
    if config.precision == "fp64" and accelerator.device.type != "cpu":
        raise ValueError(
            f"{job.name}: precision = fp64 on {accelerator.device.type}, where some kernels have "
            "no fp64 form; hide the devices (CUDA_VISIBLE_DEVICES=) or set precision to fp32"
        )
    # before the weights are read, which takes minutes
    launches.check(config, Launch.of(accelerator))
    model, tokenizer = load_policy(job.start, dtype=dtype, device=accelerator.device)
    mesh = open_mesh(
        parallel,
        device_type=accelerator.device.type,
        is_sharded=accelerator.distributed_type == DistributedType.FSDP,
    )
    parallelize(model, mesh, parallel)
    return model, tokenizer


def adapted(
    model: HybridForCausalLM, config: TrainConfig, job: Job
) -> HybridForCausalLM | PeftModel:
    """The model as it will be trained: itself, or with new adapters."""
    return model if config.lora is None else apply_lora(model, config.lora, seed=job.seed)


def fit(
    course: Course,
    model: HybridForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: TrainConfig,
    job: Job,
) -> dict[str, float]:
    """Trains along the course and leaves the policy in job.artifact; returns the final metrics."""
    metrics = train(course, model, config=config, job=job)
    save_policy(model, tokenizer, job.artifact, base=job.start)
    return metrics


def run(config: LmConfig, job: Job) -> Outcome:
    """Trains job.start on text and writes the policy to job.artifact.

    Raises:
        ValueError: if a row, a file or the starting policy is not what it should be.
        RuntimeError: as `align.loop.train`.
    """
    return run_rows(config, job, supply_texts)


def run_rows(
    config: RowsConfig,
    job: Job,
    supply: Callable[[RowsConfig, Job, PreTrainedTokenizerBase], Supplied],
) -> Outcome:
    """As `run`, on what `supply` makes of the config's rows."""
    model, tokenizer = open_start(config, job)
    data, sources = supply(config, job, tokenizer)
    course = LmCourse(data, job.accelerator, ranks_per_row=config.parallel.sequence)
    metrics = fit(course, adapted(model, config, job), tokenizer, config=config, job=job)
    return Outcome(metrics, sources)
