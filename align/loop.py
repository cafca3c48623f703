"""One training loop on accelerate for every stage kind.

An optimizer step is: make this process's microbatches, reduce their count over all processes,
then for each microbatch

    backward(loss.sum * world / global_count + aux * world * tokens / global_tokens)

(data parallelism averages gradients over `world` processes, so the factor makes a sum of it).
Gradients therefore do not depend on how a batch is split over microbatches and processes; only the
experts' aux loss, which is not linear in the batch, does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, set_seed
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel

from align import checkpoint
from align.course import Course, Job, Step
from align.data.batch import Batch
from align.lora import LoraConfig
from align.losses.types import Loss
from align.metrics import Meter, MetricsWriter, Tracker
from align.optim import OptimConfig, build_optimizer


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
    """Packed sequences per forward pass of one process; changes memory, not the result."""
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
    """Of the stage: order of the rows, dropout, new adapters; the runner hands it on in the job."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers fed beside metrics.jsonl."""
    backend: Literal["native", "trl"] = "native"
    """Whose trainer runs the stage."""


@dataclass
class _Run:
    """The moving parts of one call of `train`."""

    course: Course
    model: nn.Module
    config: TrainConfig
    job: Job
    trained: checkpoint.Trained
    meter: Meter = field(default_factory=Meter)
    tokens: float = 0.0
    trained_tokens: float = 0.0
    seconds: float = 0.0
    last: dict[str, float] = field(default_factory=dict)

    @property
    def accelerator(self) -> Accelerator:
        return self.job.accelerator

    def total(self, *values: float) -> list[float]:
        """Sums of host numbers over all processes."""
        return [float(v) for v in self.reduced(torch.tensor(values, dtype=torch.float64))]

    def reduced(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")


def train(course: Course, model: nn.Module, *, config: TrainConfig, job: Job) -> dict[str, float]:
    """Trains `model` in place along `course`; resumes from job.folder/checkpoints if there is one.

    Args:
        course: what the kind does at each step.
        model: policy or reward model, possibly wrapped by peft; parameters that require a
            gradient are trained.
        config: optimizer, precision, checkpoints, logs.
        job: folder, seed and accelerator.

    Returns: the last line of metrics: loss, grad_norm, lr, tokens (all tokens of the run so far),
        trained_tokens, seconds, step, and whatever the losses measured.

    Raises:
        ValueError: if nothing is trained, or the accelerator accumulates gradients by itself.
        RuntimeError: if a loss or gradient norm is not finite (names step and rows), a checkpoint
            cannot be written, or does not belong to this run.
    """
    accelerator = job.accelerator
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"Accelerator.gradient_accumulation_steps = {accelerator.gradient_accumulation_steps}, "
            "expected 1; microbatches are set by micro_sequences"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed is not supported by backend: native; launch with ddp or fsdp2")
    set_seed(job.seed, device_specific=True)
    if config.gradient_checkpointing:
        _recompute_activations(model)
    optimizer, scheduler = build_optimizer(model, config.optim, course.num_steps)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    run = _Run(
        course, prepared, config, job, checkpoint.Trained(prepared, wrapped.optimizer, scheduler)
    )
    start = _resume(run)
    writer = MetricsWriter(
        job.folder,
        accelerator=accelerator,
        run_name=job.name,
        resumed_step=start,
        report_to=config.report_to,
    )
    try:
        with _progress(run, start) as advance:
            for index in range(start, course.num_steps):
                _one_step(run, index, writer)
                advance(run.last)
    finally:
        writer.close()
        accelerator.free_memory()
    model.eval()
    return dict(run.last)


def _one_step(run: _Run, index: int, writer: MetricsWriter) -> None:
    began = time.monotonic()
    run.model.train()
    step = run.course.step(index)
    measured = _update(run, step, index)
    for name, value in step.metrics.items():
        run.meter.add_value(name, value)
    run.seconds += time.monotonic() - began
    done = index + 1
    if done % run.config.log_every_steps == 0 or done == run.course.num_steps:
        _write_line(run, done, measured, writer)
    every = run.config.save_every_steps
    if every and (done % every == 0 or done == run.course.num_steps):
        _save(run, done)


def _update(run: _Run, step: Step, index: int) -> dict[str, float]:
    """One optimizer step; returns loss, grad_norm and lr."""
    batches, num_own = _even(run, step.batches)
    own = batches[:num_own]
    count, tokens, trained_tokens = run.total(
        sum(run.course.count(batch) for batch in own),
        sum(batch.packed.num_tokens for batch in own),
        sum(int((batch.weights != 0).sum()) for batch in own),
    )
    lr = float(run.trained.scheduler.get_last_lr()[0])
    if not batches:
        # A sampling course may find nothing worth learning in a step; time goes on, weights stay.
        run.trained.scheduler.step()
        run.meter.add_value("empty_steps", 1.0)
        return {"loss": 0.0, "grad_norm": 0.0, "lr": lr}
    if count <= 0:
        raise RuntimeError(_about(run, index, "count of trained items = 0", _places(run, own)))
    shares = _backward(run, batches, num_own, count, tokens)
    sums = run.reduced(torch.stack(shares).sum(0).double())
    clip = run.config.optim.clip_norm or float("inf")
    norm = float(run.accelerator.clip_grad_norm_(run.model.parameters(), clip))
    loss, aux = float(sums[0]), float(sums[1])
    _check_finite(run, index, own=own, shares=shares, loss=loss + aux, norm=norm)
    run.trained.optimizer.step()
    run.trained.optimizer.zero_grad(set_to_none=True)
    run.trained.scheduler.step()
    run.tokens += tokens
    run.trained_tokens += trained_tokens
    measured: dict[str, float] = {"loss": loss, "grad_norm": norm, "lr": lr}
    return measured | ({"aux_loss": aux} if aux else {})


def _even(run: _Run, batches: Sequence[Batch]) -> tuple[list[Batch], int]:
    """Microbatches, as many on each process, and how many of them are this process's own.

    A process with fewer repeats one with weight 0, so that collectives inside forward and backward
    meet; a process with none borrows one.
    """
    accelerator, num_own = run.accelerator, len(batches)
    if accelerator.num_processes == 1:
        return list(batches), num_own
    sizes = gather_object([num_own])
    most = max(sizes)
    if most == 0:
        return [], 0
    filler = batches[-1] if batches else None
    if min(sizes) == 0:
        lender = sizes.index(most)
        lent = [filler if accelerator.process_index == lender else None]
        lent = broadcast_object_list(lent, from_process=lender)
        filler = filler if filler is not None else lent[0]
    assert filler is not None
    return [*batches, *[filler] * (most - num_own)], num_own


def _backward(
    run: _Run, batches: Sequence[Batch], num_own: int, count: float, tokens: float
) -> list[Tensor]:
    """Accumulates gradients; returns each own microbatch's ([2] loss, aux) share of the means."""
    accelerator = run.accelerator
    world = accelerator.num_processes
    shares = [torch.zeros(2, device=accelerator.device)]
    for number, batch in enumerate(batches):
        is_last = number == len(batches) - 1
        sync: AbstractContextManager[Any]
        sync = nullcontext() if is_last else accelerator.no_sync(run.model)
        with sync:
            with _precision(run):
                loss = run.course.loss(run.model, batch.to(accelerator.device))
            share = loss.sum / count
            aux = torch.zeros_like(share) if loss.aux is None else loss.aux
            aux = aux * (batch.packed.num_tokens / tokens)
            is_own = number < num_own
            accelerator.backward((share + aux) * (world if is_own else 0.0))
        if is_own:
            shares.append(torch.stack([share.detach(), aux.detach()]).float())
            run.meter.add(loss)
    return shares


def _precision(run: _Run) -> AbstractContextManager[Any]:
    if run.config.precision == "fp32":
        return nullcontext()
    return torch.autocast(run.accelerator.device.type, dtype=torch.bfloat16)


def _check_finite(
    run: _Run,
    index: int,
    *,
    own: Sequence[Batch],
    shares: Sequence[Tensor],
    loss: float,
    norm: float,
) -> None:
    # Both numbers are reduced over all processes, so all raise together.
    if not torch.isfinite(torch.tensor(loss)):
        bad = [
            batch
            for batch, share in zip(own, shares[1:], strict=True)
            if not torch.isfinite(share).all()
        ]
        raise RuntimeError(_about(run, index, f"loss = {loss}", _places(run, bad)))
    if not torch.isfinite(torch.tensor(norm)):
        raise RuntimeError(_about(run, index, f"gradient norm = {norm}", _places(run, own)))


def _places(run: _Run, batches: Sequence[Batch]) -> list[str]:
    mine = [place for batch in batches for place in batch.places]
    return gather_object(mine) if run.accelerator.num_processes > 1 else mine


def _about(run: _Run, index: int, what: str, places: Sequence[str]) -> str:
    shown = ", ".join(dict.fromkeys(places[:8])) + (
        f" and {len(places) - 8} more" if len(places) > 8 else ""
    )
    return (
        f"{run.job.name}: step {index + 1}: {what}, expected a finite number (and > 0 items); "
        f"rows: {shown}; look at these rows or lower optim.lr"
    )


def _write_line(run: _Run, done: int, measured: dict[str, float], writer: MetricsWriter) -> None:
    head = {"step": float(done), "tokens": run.tokens, "trained_tokens": run.trained_tokens}
    pace = {"seconds": run.seconds, "tokens_per_s": run.tokens / max(run.seconds, 1e-9)}
    run.last = head | measured | run.meter.means(run.accelerator) | pace
    run.meter = Meter()
    writer.write(run.last)


def _save(run: _Run, done: int) -> None:
    state = {
        "meter": run.meter.state_dict(),
        "tokens": run.tokens,
        "trained_tokens": run.trained_tokens,
        "seconds": run.seconds,
        "last": dict(run.last),
    }
    checkpoint.save(
        run.job.folder / "checkpoints",
        run.trained,
        checkpoint.Progress(step=done, course=run.course.state_dict(), state=state),
        config=run.config.model_dump_json(indent=1),
        keep=run.config.keep_checkpoints,
        accelerator=run.accelerator,
    )


def _resume(run: _Run) -> int:
    """Steps already done: 0, or what the newest checkpoint holds."""
    folder = run.job.folder / "checkpoints"
    if run.accelerator.is_main_process and folder.exists():
        checkpoint.clean(folder)
    run.accelerator.wait_for_everyone()
    path = checkpoint.latest(folder)
    if path is None:
        return 0
    progress = checkpoint.load(
        path, run.trained, config=run.config.model_dump_json(), accelerator=run.accelerator
    )
    run.course.load_state_dict(dict(progress.course))
    run.meter.load_state_dict(progress.state["meter"])
    run.tokens = progress.state["tokens"]
    run.trained_tokens = progress.state["trained_tokens"]
    run.seconds = progress.state["seconds"]
    run.last = dict(progress.state["last"])
    return progress.step


def _recompute_activations(model: nn.Module) -> None:
    inside = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inside is None:
        raise ValueError(
            f"gradient_checkpointing = true, but {type(model).__name__} holds no transformers "
            "model; set it to false"
        )
    inside.gradient_checkpointing_enable({"use_reentrant": False})


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
    is_shown = run.accelerator.is_main_process and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as progress:
        task = progress.add_task(run.job.name, total=run.course.num_steps, completed=start, told="")

        def advance(line: dict[str, float]) -> None:
            told = f"loss {line['loss']:.4f}  {line['tokens_per_s']:.0f} tok/s" if line else ""
            progress.update(task, advance=1, told=told)

        yield advance


def mean_loss(
    course: Course, model: nn.Module, batches: Sequence[Batch], *, accelerator: Accelerator
) -> dict[str, float]:
    """Loss over given microbatches without gradients, aux left out, and the losses' own metrics.

    Args:
        batches: this process's share; sums are reduced over all processes.
    """
    was_training = model.training
    model.eval()
    meter = Meter()
    total = count = 0.0
    with torch.no_grad():
        for batch in batches:
            loss: Loss = course.loss(model, batch.to(accelerator.device))
            total += float(loss.sum)
            count += course.count(batch)
            meter.add(loss)
    model.train(was_training)
    sums = torch.tensor([total, count], dtype=torch.float64, device=accelerator.device)
    total, count = (float(value) for value in accelerator.reduce(sums, reduction="sum"))
    if count <= 0:
        raise ValueError("mean_loss: no batch trains anything; pass at least one")
    return {"loss": total / count} | meter.means(accelerator)
