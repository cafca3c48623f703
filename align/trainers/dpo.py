"""Kind `dpo`: preference pairs, against the policy that the stage starts from.

The reference is scored on the same packed batch, in the same process and precision, so that at
step 0 both agree to the last bit and the loss is ln 2. With full training it is a frozen copy; with
adapters it is the same model with the adapters switched off.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn

from align.course import Job, Outcome
from align.data.batch import Batch
from align.data.sources import DataConfig
from align.data.supply import supply_pairs
from align.loop import TrainConfig
from align.losses.dpo import chosen_nll, dpo_loss, sequence_logprobs
from align.losses.types import Loss
from align.trainers.lm import FixedCourse, adapted, fit, open_start
from model import HybridForCausalLM


class DpoConfig(TrainConfig):
    """Direct preference optimisation on preference rows."""

    data: tuple[DataConfig, ...] = Field(min_length=1)
    """Where the pairs come from, and how much of each."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference, per nat; larger stays closer."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is wrong."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen answer's mean negative log-likelihood, added to the loss."""


@contextmanager
def reference_of(model: HybridForCausalLM | PeftModel) -> Iterator[nn.Module]:
    """What the policy is compared with: its adapters off, or `model` itself if it has none."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield model
    else:
        yield model


@dataclass(frozen=True)
class DpoCourse(FixedCourse):
    """Sigmoid DPO over packed pairs; counts pairs.

    Args:
        reference: a frozen model of its own, or the policy with adapters that can be switched off.
    """

    reference: HybridForCausalLM | PeftModel
    config: DpoConfig

    def count(self, batch: Batch) -> float:
        return float(len(batch.pairs))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        lengths, config = batch.packed.lengths, self.config
        # First: switching adapters off and on must not come between a forward and its backward.
        reference = sequence_logprobs(self._reference_logprobs(batch), batch.weights, lengths)
        out = model(packed=batch.packed, targets=batch.targets)
        loss = dpo_loss(
            sequence_logprobs(out.logprobs, batch.weights, lengths),
            reference,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            aux=out.aux_loss,
        )
        if not config.sft_weight:
            return loss
        nll = chosen_nll(out.logprobs, batch.weights, lengths)
        pairs = nll.new_full((), len(batch.pairs))
        return replace(
            loss,
            sum=loss.sum + config.sft_weight * nll,
            metrics={**loss.metrics, "nll/chosen": (nll.detach(), pairs)},
        )

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> Tensor:
        with reference_of(self.reference) as reference:
            return reference(packed=batch.packed, targets=batch.targets).logprobs


def run(config: DpoConfig, job: Job) -> Outcome:
    """Trains job.start on preference pairs and writes the policy to job.artifact.

    Raises:
        ValueError: if a row, a file or the starting policy is not what it should be.
        RuntimeError: as `align.loop.train`.
    """
    start, tokenizer = open_start(config, job)
    data, sources = supply_pairs(config, job, tokenizer)
    model = adapted(start, config, job)
    frozen = model if config.lora else copy.deepcopy(start).requires_grad_(False)
    course = DpoCourse(
        data,
        job.accelerator,
        reference=frozen,
        config=config,
        ranks_per_row=config.parallel.sequence,
    )
    metrics = fit(course, model, tokenizer, config=config, job=job)
    return Outcome(metrics, sources)
