"""TRL's trainers with our optimizer steps: the only subclasses of them, on public methods alone.

Overridden are what transformers names for it (`get_train_dataloader`, `training_step`,
`create_optimizer`, `create_scheduler`, `compute_loss`, `compute_loss_context_manager`), and TRL's
sender of telemetry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import GenerationConfig, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from align.course import Job
from align.data.batch import Batch, Pair
from align.data.loader import PackedData
from align.loop import TrainConfig
from align.metrics import MetricsWriter
from align.optim import build_optimizer

Inputs = dict[str, Any]


class StepList(Dataset):
    """Our optimizer steps as a dataset: item `step * world + rank` is that rank's microbatches."""

    def __init__(self, data: PackedData, world: int) -> None:
        self.data = data
        self.world = world

    def __len__(self) -> int:
        return self.data.num_steps * self.world

    def __getitem__(self, index: int) -> tuple[Batch, ...]:
        step, rank = divmod(index, self.world)
        batches = self.data.batches(step, rank, self.world)
        if not batches:
            raise ValueError(
                f"backend: trl: step {step + 1} has fewer packed sequences than the {self.world} "
                "processes; use fewer processes, more rows or backend: native"
            )
        return batches


def sft_inputs(batch: Batch) -> Inputs:
    """A packed microbatch in the form of TRL's padding-free collator: [1, T] and its borders.

    Example:
        >>> from align.data.batch import Example
        >>> batch = Batch.from_examples([Example((5, 6), (0.0, 1.0), "a:1")] * 2)
        >>> inputs = sft_inputs(batch)
        >>> inputs["labels"].tolist(), inputs["cu_seq_lens_q"].tolist()
        ([[-100, 6, -100, 6]], [0, 2, 4])
    """
    packed = batch.packed
    # Targets are those of the next position; TRL's labels are of the position itself.
    labels = torch.full_like(packed.tokens, -100)
    labels[1:] = batch.targets[:-1].masked_fill(batch.weights[:-1] == 0, -100)
    longest = max(packed.lengths)
    return {
        "input_ids": packed.tokens[None],
        "labels": labels[None],
        "position_ids": packed.positions[None],
        "cu_seq_lens_q": packed.cu_seqlens,
        "cu_seq_lens_k": packed.cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def dpo_inputs(pairs: Sequence[Pair]) -> Inputs:
    """Pairs in the form of TRL's preference collator: all chosen, then all rejected, padded right.

    `completion_mask` follows our weights, so user turns inside a long answer stay untrained.
    """
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    columns = {
        "input_ids": [torch.tensor(side.tokens) for side in sides],
        "attention_mask": [torch.ones(len(side.tokens), dtype=torch.long) for side in sides],
        "completion_mask": [torch.tensor(side.weights).long() for side in sides],
    }
    return {name: pad_sequence(rows, batch_first=True) for name, rows in columns.items()}


@dataclass
class Plan:
    """What a trainer is told to do, and how far it is.

    Args:
        num_steps: optimizer steps of the run.
        kept: keys of the model's config that TRL changes, as they were.
        generation: the model's generation config, as it was.
        tokens: of all steps so far, over all processes; 0 where TRL counts them itself.
        last: the last line of metrics.
    """

    config: TrainConfig
    job: Job
    num_steps: int
    kept: Mapping[str, Any]
    generation: GenerationConfig
    tokens: float = 0.0
    last: dict[str, float] = field(default_factory=dict)

    def refuse(self, step: int, what: str, rows: Sequence[str] = ()) -> None:
        told = f"; rows: {', '.join(dict.fromkeys(rows[:8]))}" if rows else ""
        raise RuntimeError(
            f"{self.job.name}: step {step}: {what}, expected a finite number{told}; "
            "look at the rows or lower optim.lr"
        )


class Reporter(TrainerCallback):
    """TRL's numbers into metrics.jsonl; stops a run whose gradient is not finite."""

    def __init__(self, plan: Plan, writer: MetricsWriter) -> None:
        self.plan = plan
        self.writer = writer

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs[name]):
                self.plan.refuse(state.global_step, f"{name} = {logs[name]}")
        # grpo's tokens are counted by TRL; the fixed rows' by the steps themselves.
        tokens = self.plan.tokens or float(state.num_input_tokens_seen)
        line = {**logs, "step": float(state.global_step), "tokens": tokens}
        self.plan.last = line
        self.writer.write(line)


class OurTrainer(Trainer):
    """What all three subclasses share: our optimizer, our precision, no telemetry."""

    plan: Plan
    schedule: LambdaLR

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        trained = self.model if model is None else model
        assert trained is not None, "built with one"
        self.optimizer, self.schedule = build_optimizer(
            trained, self.plan.config.optim, self.plan.num_steps
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        if num_training_steps != self.plan.num_steps:
            raise RuntimeError(
                f"{self.plan.job.name}: TRL would take {num_training_steps} steps, expected "
                f"{self.plan.num_steps}; use backend: native"
            )
        self.lr_scheduler = self.schedule
        return self.schedule

    def compute_loss_context_manager(self) -> ExitStack:
        stack = super().compute_loss_context_manager()
        if self.plan.config.precision == "bf16":
            stack.enter_context(torch.autocast(self.accelerator.device.type, torch.bfloat16))
        return stack

    def floating_point_ops(self, inputs: Any) -> int:
        """0: transformers' count takes every layer for full attention."""
        return 0

    def _send_telemetry(self) -> None:
        """Sends nothing."""


class SteppedTrainer(OurTrainer):
    """Exactly our optimizer steps over fixed rows.

    One item of the loader is a whole optimizer step of one process, a list of microbatches, so
    steps may differ in their number; the trainer's own accumulation stays at 1.
    """

    data: PackedData
    collate: Callable[[Batch], Inputs]

    def get_train_dataloader(self) -> DataLoader:
        steps = StepList(self.data, self.accelerator.num_processes)
        loader: DataLoader = DataLoader(
            steps,
            batch_size=1,
            sampler=SequentialSampler(steps),
            collate_fn=lambda items: [self.collate(batch) for batch in items[0]],
        )
        return self.accelerator.prepare(loader)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One whole optimizer step: every microbatch through TRL's own training_step."""
        self.current_gradient_accumulation_steps = len(inputs)
        counts = torch.tensor([[self.count(micro), num_tokens(micro)] for micro in inputs])
        counts = counts.double().sum(0).to(self.accelerator.device)
        total, tokens = self.accelerator.reduce(counts, reduction="sum")
        self.plan.tokens += float(tokens)
        losses = []
        for index, micro in enumerate(inputs):
            is_last = index == len(inputs) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, micro, total))
        loss = torch.stack(losses).sum()
        if not torch.isfinite(loss):
            step, rank = self.state.global_step, self.accelerator.process_index
            batches = self.data.batches(step, rank, self.accelerator.num_processes)
            rows = [place for batch in batches for place in batch.places]
            self.plan.refuse(step + 1, f"loss = {float(loss)}", rows)
        return loss

    def count(self, micro: Inputs) -> float:
        """What this microbatch adds to the denominator."""
        raise TypeError(f"{type(self).__name__} does not say what it counts")


class SteppedSft(SteppedTrainer, SFTTrainer):
    def count(self, micro: Inputs) -> float:
        return float((micro["labels"][..., 1:] != -100).sum())


class SteppedDpo(SteppedTrainer, DPOTrainer):
    def count(self, micro: Inputs) -> float:
        return len(micro["input_ids"]) / 2

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """TRL's mean over a microbatch, weighed by its share of the step's pairs."""
        assert num_items_in_batch is not None, "training_step counts the pairs"
        loss = super().compute_loss(model, inputs)
        # training_step divides by the number of microbatches, and DDP by that of processes.
        parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        return loss * (self.count(inputs) * parts / float(num_items_in_batch))


class OurGrpo(OurTrainer, GRPOTrainer):
    """TRL's loop as it is; prompts, rollouts and scores come through its seams."""


def num_tokens(micro: Inputs) -> float:
    """Real tokens of a microbatch."""
    mask = micro.get("attention_mask")
    return float(micro["input_ids"].numel() if mask is None else mask.sum())
