"""One optimizer update, made of microbatches of all processes.

The count is reduced over all processes first; then each microbatch runs

    backward(loss.sum * world / count + aux * world * tokens / all_tokens)

where data parallelism averages over `world` processes, so the factor makes a sum of it. Gradients
do not depend on how a batch is split over microbatches and processes; only the experts' aux loss,
which is not linear in the batch, does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from align.checkpoint import Trained
from align.course import Course
from align.data.batch import Batch
from align.losses.types import Loss

Precision = Literal["fp32", "bf16"]
SHOWN_PLACES = 8


@dataclass(frozen=True)
class Updated:
    """What an update told.

    Args:
        metrics: loss and aux_loss (means over all processes), grad_norm before clipping, lr.
        losses: of this process's microbatches, detached.
        tokens, trained_tokens: of all processes.
    """

    metrics: dict[str, float]
    losses: tuple[Loss, ...] = ()
    tokens: float = 0.0
    trained_tokens: float = 0.0


@dataclass(frozen=True)
class Updater:
    """Makes updates; all that stays the same between them.

    Args:
        clip_norm: largest gradient norm; 0 clips nothing.
    """

    course: Course
    trained: Trained
    accelerator: Accelerator
    clip_norm: float
    precision: Precision

    def update(self, own: Sequence[Batch], *, title: str) -> Updated:
        """Forward, backward and step over this process's microbatches and everybody else's.

        Args:
            title: stage and step, for messages.

        Raises:
            RuntimeError: if nothing is counted, or a loss or the gradient norm is not finite; the
                weights are then still those before. Every process raises.
        """
        lr = float(self.trained.scheduler.get_last_lr()[0])
        count, tokens, trained_tokens = self._totals(own)
        batches = self._even(own)
        if not batches:
            # A course that samples may find nothing worth learning; time goes on, weights stay.
            self.trained.scheduler.step()
            return Updated({"loss": 0.0, "grad_norm": 0.0, "lr": lr, "is_empty": 1.0})
        if count <= 0:
            self._fail(title, f"count of trained items = {count:g}, expected above 0", own)
        losses = self._backward(batches, len(own), count, tokens)
        shares = [_share(*pair, count, tokens) for pair in zip(losses, own, strict=True)]
        norm = self._gradient_norm()
        loss, aux = self._reduced(shares)
        if not math.isfinite(loss + aux):
            bad = [b for b, share in zip(own, shares, strict=True) if not share.isfinite().all()]
            self._fail(title, f"loss = {loss + aux}, expected a finite number", bad)
        if not math.isfinite(norm):
            self._fail(title, f"gradient norm = {norm}, expected a finite number", own)
        self.trained.optimizer.step()
        self.trained.optimizer.zero_grad(set_to_none=True)
        self.trained.scheduler.step()
        metrics = {"loss": loss, "grad_norm": norm, "lr": lr} | ({"aux_loss": aux} if aux else {})
        return Updated(metrics, tuple(losses), tokens, trained_tokens)

    def _totals(self, own: Sequence[Batch]) -> tuple[float, float, float]:
        sums = torch.tensor(
            [
                sum(self.course.count(batch) for batch in own),
                sum(batch.packed.num_tokens for batch in own),
                sum(int((batch.weights != 0).sum()) for batch in own),
            ],
            dtype=torch.float64,
            device=self.accelerator.device,
        )
        count, tokens, trained = self.accelerator.reduce(sums, reduction="sum").tolist()
        return count, tokens, trained

    def _even(self, own: Sequence[Batch]) -> list[Batch]:
        """As many microbatches on each process, this process's own first.

        A process with fewer repeats its last with weight 0, so that collectives inside forward and
        backward meet; a process with none borrows one.
        """
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return list(own)
        sizes = gather_object([len(own)])
        most = max(sizes)
        filler = list(own[-1:])
        if most and min(sizes) == 0:
            lender = sizes.index(most)
            lent: list[Any] = filler if accelerator.process_index == lender else [None]
            broadcast_object_list(lent, from_process=lender)
            filler = filler or lent
        return [*own, *filler * (most - len(own))]

    def _backward(
        self, batches: Sequence[Batch], num_own: int, count: float, tokens: float
    ) -> list[Loss]:
        """Accumulates gradients; the losses of this process's own microbatches."""
        accelerator, model = self.accelerator, self.trained.model
        losses: list[Loss] = []
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(model):
                with self._autocast():
                    loss = self.course.loss(model, batch.to(accelerator.device))
                share = _share(loss, batch, count, tokens).sum()
                scale = accelerator.num_processes if number < num_own else 0
                accelerator.backward(share * scale)
            if number < num_own:
                losses.append(_detached(loss))
        return losses

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)

    def _gradient_norm(self) -> float:
        model: nn.Module = self.trained.model
        limit = self.clip_norm or math.inf
        return float(self.accelerator.clip_grad_norm_(model.parameters(), limit))

    def _reduced(self, shares: Sequence[Tensor]) -> tuple[float, float]:
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for share in shares:
            sums += share
        loss, aux = self.accelerator.reduce(sums, reduction="sum").tolist()
        return loss, aux

    def _fail(self, title: str, what: str, batches: Sequence[Batch]) -> None:
        # What failed was reduced over all processes, so all come here together.
        places = [place for batch in batches for place in batch.places]
        if self.accelerator.num_processes > 1:
            places = gather_object(places)
        places = list(dict.fromkeys(places))
        more = len(places) - SHOWN_PLACES
        shown = ", ".join(places[:SHOWN_PLACES]) + (f" and {more} more" if more > 0 else "")
        raise RuntimeError(f"{title}: {what}; rows: {shown}; look at them or lower optim.lr")


def _share(loss: Loss, batch: Batch, count: float, tokens: float) -> Tensor:
    """[2]: what a microbatch adds to the mean loss and to the mean aux loss."""
    share = loss.sum.float() / count
    if loss.aux is None:
        return torch.stack([share, torch.zeros_like(share)])
    return torch.stack([share, loss.aux.float() * (batch.packed.num_tokens / tokens)])


def _detached(loss: Loss) -> Loss:
    aux = None if loss.aux is None else loss.aux.detach()
    return replace(loss, sum=loss.sum.detach(), aux=aux)
