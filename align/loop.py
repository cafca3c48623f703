"""One training loop on accelerate for every stage kind: steps, metrics, checkpoints, resume.

What an update is stands in align/update.py, what differs between kinds in their courses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import Optimizer

from align import checkpoint, launches
from align.course import Course, Job
from align.launches import Launch
from align.lora import LoraConfig, shard_head
from align.metrics import Meter, MetricsWriter, Tracker
from align.optim import OptimConfig, build_optimizer
from align.peaks import peak_operations
from align.throughput import trained_operations
from align.update import Precision, Updater, host_group
from align.watch import Watch
from model import HybridModel
from model.checkpointing import Checkpointing
from model.parallel.apply import mesh_of
from model.parallel.expert import leave_out_of_ddp, shared_modules, spread_over_replicas
from model.parallel.mesh import Mesh, ParallelConfig


class TrainConfig(BaseModel):
    """What every stage that updates weights has in common; each kind's config extends it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence_tokens: int = Field(default=8192, ge=2)
    """Capacity of one packed sequence in tokens; no row may be longer."""
    batch_sequences: int = Field(default=128, ge=1)
    """Packed sequences per optimizer step, over all processes."""
    batch_items: int = Field(default=0, ge=0)
    """If above 0, rows (or pairs) per optimizer step in place of batch_sequences."""
    micro_sequences: int = Field(default=1, ge=1)
    """Packed sequences per forward pass, the piece in which a step is dealt out to processes: give
    it one for each or more. Changes memory, and what the experts' balance and capacity count."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the data; not used when max_steps is set."""
    max_steps: int = Field(default=0, ge=0)
    """Optimizer steps of the run; 0 means as many as the epochs make."""
    shuffle: bool = True
    """A new order of the rows in each epoch; false keeps the order of the data."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    lora: LoraConfig | None = None
    """Adapters to train instead of the weights; absent means full training."""
    precision: Precision = "fp32"
    """Type of the forward and backward pass; what is trained and updated says optim.weights. fp64,
    on a CPU only, proves that a launch, a mesh or a resume computes the same thing: weights,
    optimizer, engine and what is saved are fp64 too, and evals, samples and scores of what was
    saved. Gradients are rounded to bf16 before they are used, which takes away what the order of a
    sum rounded: weights are then equal to the bit, however many processes share what."""
    checkpointing: Checkpointing = "none"
    """What backward computes again: nothing; all but projections and softmax attention
    (selective), or each whole block (full), whose inputs the host may hold (host)."""
    parallel: ParallelConfig = ParallelConfig()
    """Processes that share a row of tokens, or the experts; the rest is data parallelism."""
    save_every_steps: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 writes none."""
    keep_checkpoints: int = Field(default=1, ge=1)
    """Newest checkpoints kept on disk."""
    log_every_steps: int = Field(default=1, ge=1)
    """Steps per line of metrics.jsonl."""
    seed: int = Field(default=0, ge=0)
    """Of the stage: order of the rows, dropout, new adapters; the runner hands it on in the job."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers fed beside metrics.jsonl."""
    backend: Literal["native", "trl"] = "native"
    """Whose trainer runs the stage."""

    @property
    def max_sequences(self) -> int:
        """Packed sequences of an optimizer step, at most."""
        return self.batch_items or self.batch_sequences

    @property
    def weights_dtype(self) -> torch.dtype:
        """Type of the weights that are trained."""
        if self.precision == "fp64":
            return torch.float64
        return torch.float32 if self.optim.weights == "fp32" else torch.bfloat16

    @property
    def has_autocast(self) -> bool:
        """Whether forward and backward run in bf16 on wider weights."""
        return self.precision == "bf16" and self.optim.weights == "fp32"

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.optim.weights != "fp32" and (self.precision != "bf16" or self.lora is not None):
            raise ValueError(
                f"optim.weights = {self.optim.weights} needs precision: bf16 and no lora (adapters "
                "are small enough for fp32); set it to fp32"
            )
        return self

    @model_validator(mode="after")
    def _native_in_fp64(self) -> Self:
        if self.precision == "fp64" and self.backend != "native":
            raise ValueError(
                f"precision = fp64 with backend = {self.backend}, expected native: other trainers "
                "round to fp32; set one of the two back"
            )
        return self

    @model_validator(mode="after")
    def _can_be_shared(self) -> Self:
        parallel = self.parallel
        if self.backend != "native" and parallel != ParallelConfig():
            raise ValueError(
                f"parallel.sequence = {parallel.sequence} and parallel.expert = {parallel.expert} "
                f"with backend = {self.backend}, expected 1: other trainers know no shared rows; "
                "remove parallel or set backend to native"
            )
        if self.sequence_tokens < parallel.sequence:
            raise ValueError(
                f"parallel.sequence = {parallel.sequence}, expected at most sequence_tokens = "
                f"{self.sequence_tokens}: no row has a token for each; lower parallel.sequence"
            )
        return self


@dataclass
class _Run:
    """The moving parts of one call of `train`."""

    updater: Updater
    config: TrainConfig
    job: Job
    writer: MetricsWriter
    watch: Watch
    meter: Meter = field(default_factory=Meter)
    tokens: float = 0.0
    trained_tokens: float = 0.0
    operations: float = 0.0
    seconds: float = 0.0
    last: dict[str, float] = field(default_factory=dict)

    @property
    def course(self) -> Course:
        return self.updater.course


def train(course: Course, model: nn.Module, *, config: TrainConfig, job: Job) -> dict[str, float]:
    """Trains `model` in place along `course`; resumes from job.folder/checkpoints if there is one.

    Args:
        course: what the kind does at each step.
        model: policy or reward model, possibly wrapped by peft; parameters that require a
            gradient are trained.
        config: optimizer, precision, checkpoints, logs.
        job: folder, seed and accelerator.

    Returns: the last line of metrics: loss, grad_norm, lr, tokens (all tokens of the run so far),
        trained_tokens, seconds, tokens_per_s, step, and whatever the losses measured; under bf16
        on a known device also mfu, the share of the devices' dense bf16 peak that forward and
        backward of the trained model used, over all the time of the steps, sampling included.

    Raises:
        ValueError: if nothing is trained, weights are not as optim.weights says, the accelerator
            accumulates gradients by itself, or shards in a way that is not supported: DeepSpeed,
            FSDP 1.
        RuntimeError: if a loss or gradient norm is not finite (names step and rows), a checkpoint
            cannot be written, or does not belong to this run.
    """
    accelerator = job.accelerator
    _check(accelerator, config)
    _check_dtypes(model, config)
    if config.backend != "native":
        raise ValueError(
            f"backend = {config.backend!r} reached the native loop; call align.trl_backend instead"
        )
    set_seed(job.seed, device_specific=True)
    set_checkpointing(model, config.checkpointing)
    mesh = mesh_of(model)
    if accelerator.is_fsdp2:
        _shard(accelerator, model, mesh)
    optimizer, scheduler = build_optimizer(model, config.optim, course.num_steps)
    prepared, wrapped = _prepare(accelerator, model, optimizer)
    run = _Run(
        updater=Updater(
            course=course,
            trained=checkpoint.Trained(prepared, wrapped.optimizer, scheduler),
            accelerator=accelerator,
            clip_norm=config.optim.clip_norm,
            has_autocast=config.has_autocast,
            rounds_gradients=config.precision == "fp64",
            operations=trained_operations(model),
            hosts=host_group(accelerator),
            mesh=mesh,
            seed=job.seed,
        ),
        config=config,
        job=job,
        writer=MetricsWriter(
            job.folder, accelerator=accelerator, run_name=job.name, report_to=config.report_to
        ),
        watch=Watch(accelerator, job.name),
    )
    try:
        start = _resume(run)
        run.writer.open(resumed_step=start)
        with run.watch, _progress(run, start) as advance:
            for index in range(start, course.num_steps):
                with _naming(run, index):
                    _one_step(run, index)
                advance(run.last)
    finally:
        run.writer.close()
        accelerator.free_memory()
    model.eval()
    return dict(run.last)


def _shard(accelerator: Accelerator, model: nn.Module, mesh: Mesh) -> None:
    """Shards what accelerate would not shard so, before the optimizer sees the parameters."""
    if isinstance(model, PeftModel):
        shard_head(model)
    accelerator.state.fsdp_plugin.ignored_modules = shared_modules(model) or None
    spread_over_replicas(model, mesh)


def _prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Leaves to data parallelism what ranks do not share otherwise."""
    if not leave_out_of_ddp(model) and not accelerator.is_fsdp2:
        # adapters on shared experts alone, whose gradients the update sums itself
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        return prepared, accelerator.prepare_optimizer(optimizer)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    return prepared, wrapped


def _check(accelerator: Accelerator, config: TrainConfig) -> None:
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"Accelerator.gradient_accumulation_steps = {accelerator.gradient_accumulation_steps}, "
            "expected 1; microbatches are set by micro_sequences"
        )
    launches.check(config, Launch.of(accelerator))


def _check_dtypes(model: nn.Module, config: TrainConfig) -> None:
    found = {p.dtype for p in model.parameters() if p.requires_grad}
    wanted = config.weights_dtype
    if found and wanted not in found:
        raise ValueError(
            f"precision = {config.precision} with optim.weights = {config.optim.weights}, but no "
            f"trained weight is {wanted}; open the model in it"
        )


# What gloo, NCCL and the store say to those whose neighbour is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket", "NCCL")


@contextmanager
def _naming(run: _Run, index: int) -> Iterator[None]:
    """Says which process stopped where, if it stops because another one is gone."""
    run.watch.step = index + 1
    try:
        yield
    except RuntimeError as error:
        told = str(error)
        if run.job.accelerator.num_processes == 1 or not any(sign in told for sign in LOST):
            raise
        raise RuntimeError(
            f"{run.job.name}: process {run.job.accelerator.process_index} stops at step "
            f"{index + 1}: {run.watch.who()} is gone ({told.splitlines()[0]}); run again to go on "
            "from the last checkpoint"
        ) from error


def _one_step(run: _Run, index: int) -> None:
    began = time.monotonic()
    run.updater.trained.model.train()
    step = run.course.step(index)
    title = f"{run.job.name}: step {index + 1}"
    updated = run.updater.update(step.batches, index=index, title=title)
    # once each: processes that share a row all have its losses, and all have the step's metrics
    if run.updater.mesh.sequence.rank == 0:
        for loss in updated.losses:
            run.meter.add(loss)
    if run.job.accelerator.is_main_process:
        for name, value in step.metrics.items():
            run.meter.add_value(name, value)
    run.tokens += updated.tokens
    run.trained_tokens += updated.trained_tokens
    run.operations += updated.operations
    run.seconds += time.monotonic() - began
    done = index + 1
    if done % run.config.log_every_steps == 0 or done == run.course.num_steps:
        _write_line(run, done, updated.metrics)
    every = run.config.save_every_steps
    if every and (done % every == 0 or done == run.course.num_steps):
        _save(run, done)


def _write_line(run: _Run, done: int, measured: dict[str, float]) -> None:
    head = {"step": float(done), "tokens": run.tokens, "trained_tokens": run.trained_tokens}
    seconds = max(run.seconds, 1e-9)
    pace = {"seconds": run.seconds, "tokens_per_s": run.tokens / seconds}
    accelerator = run.job.accelerator
    peak = peak_operations(accelerator.device) * accelerator.num_processes
    if run.config.precision == "bf16" and run.operations and math.isfinite(peak):
        pace["mfu"] = run.operations / seconds / peak
    run.last = head | measured | run.meter.means(accelerator) | pace
    run.meter = Meter()
    run.writer.write(run.last)


def _save(run: _Run, done: int) -> None:
    state = {
        "meter": run.meter.state_dict(run.job.accelerator),
        "tokens": run.tokens,
        "trained_tokens": run.trained_tokens,
        "operations": run.operations,
        "seconds": run.seconds,
        "last": dict(run.last),
    }
    checkpoint.save(
        run.job.folder / "checkpoints",
        run.updater.trained,
        checkpoint.Progress(step=done, course=run.course.state_dict(), state=state),
        config=run.config.model_dump_json(indent=1),
        keep=run.config.keep_checkpoints,
        accelerator=run.job.accelerator,
    )


def _resume(run: _Run) -> int:
    """Steps already done: 0, or what the newest checkpoint holds."""
    folder = run.job.folder / "checkpoints"
    accelerator = run.job.accelerator
    if accelerator.is_main_process and folder.exists():
        checkpoint.clean(folder)
    accelerator.wait_for_everyone()
    path = checkpoint.latest(folder)
    if path is None:
        return 0
    progress = checkpoint.load(path, run.updater.trained, config=run.config.model_dump_json())
    run.course.load_state_dict(dict(progress.course))
    if accelerator.is_main_process:
        # sums over all processes, which are summed again
        run.meter.load_state_dict(progress.state["meter"])
    run.tokens = progress.state["tokens"]
    run.trained_tokens = progress.state["trained_tokens"]
    run.operations = progress.state["operations"]
    run.seconds = progress.state["seconds"]
    run.last = dict(progress.state["last"])
    return progress.step


def set_checkpointing(model: nn.Module, checkpointing: Checkpointing) -> None:
    """What the trunk inside `model` computes again in backward.

    Raises:
        ValueError: if something should be and there is no trunk of ours.
    """
    trunk = next((m for m in model.modules() if isinstance(m, HybridModel)), None)
    if trunk is not None:
        trunk.checkpointing = checkpointing
    elif checkpointing != "none":
        raise ValueError(
            f"checkpointing = {checkpointing}, but {type(model).__name__} holds no HybridModel; "
            "set it to none"
        )


@contextmanager
def _progress(run: _Run, start: int) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    is_shown = run.job.accelerator.is_main_process and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as progress:
        task = progress.add_task(run.job.name, total=run.course.num_steps, completed=start, told="")

        def advance(line: dict[str, float]) -> None:
            told = f"loss {line['loss']:.4f}  {line['tokens_per_s']:.0f} tok/s" if line else ""
            progress.update(task, advance=1, told=told)

        yield advance
