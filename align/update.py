"""One optimizer update, made of microbatches of all processes.

The count is reduced over all processes first; then each microbatch runs

    backward(loss.sum * world / count + aux * world * tokens / all_tokens)

where data parallelism averages over `world` processes, so the factor makes a sum of it. Processes
that share a row all have its loss, and each takes 1 / sequence of it: `world` is then the number of
rows that are computed at once. The experts' aux loss is not linear in the batch, so it depends on
what a microbatch is; which process computes it changes nothing, and neither do random numbers
(dropout), whose seed is the number of the update and of the microbatch.

The host waits for the device once an update, to read loss and gradient norm before the weights
change: what is not finite then stops the run with the weights as they were, and the wait costs
little, because the optimizer's kernels, launched next, keep the device busy while the host makes
the next batch. Counts never leave the host: processes tell them to each other over gloo.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align.checkpoint import Trained
from align.course import Course
from align.data.batch import Batch
from align.losses.types import Loss
from model.parallel.expert import average_expert_gradients, clip_gradients
from model.parallel.mesh import Mesh

Precision = Literal["fp32", "bf16", "fp64"]
SHOWN_PLACES = 8


@dataclass(frozen=True)
class Updated:
    """What an update told.

    Args:
        metrics: loss and aux_loss (means over all processes), grad_norm before clipping, lr.
        losses: of this process's microbatches, detached.
        tokens, trained_tokens: of all processes.
        operations: multiplications and additions of the update, of all processes; 0 if unknown.
    """

    metrics: dict[str, float]
    losses: tuple[Loss, ...] = ()
    tokens: float = 0.0
    trained_tokens: float = 0.0
    operations: float = 0.0


class _Totals(NamedTuple):
    """Sums over all processes, and the number of microbatches of each."""

    counted: float
    tokens: float
    trained_tokens: float
    operations: float
    sizes: tuple[int, ...]


def host_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """The processes again, talking from host to host; None for one. Every process calls it."""
    return dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None


@dataclass(frozen=True)
class Updater:
    """Makes updates; all that stays the same between them.

    Args:
        clip_norm: largest gradient norm; 0 clips nothing.
        has_autocast: whether forward and backward run in bf16 on wider weights.
        rounds_gradients: to bf16's 8 bits, clipped ones. What other sums round otherwise in fp64 is
            then gone before a weight has changed: it would grow 1e12 times over a ladder.
        operations: of one microbatch's lengths, forward and backward.
        hosts: from `host_group`.
        mesh: the axes that the model is shared over.
        seed: of the stage.
    """

    course: Course
    trained: Trained
    accelerator: Accelerator
    clip_norm: float
    has_autocast: bool
    rounds_gradients: bool
    operations: Callable[[Sequence[int]], float]
    hosts: dist.ProcessGroup | None
    mesh: Mesh
    seed: int

    def update(self, own: Sequence[Batch], *, index: int, title: str) -> Updated:
        """Forward, backward and step over this process's microbatches and everybody else's.

        Args:
            own: of all microbatches, dealt out to the rows of processes by turns.
            index: of the update, 0-based.
            title: stage and step, for messages.

        Raises:
            RuntimeError: if nothing is counted, or a loss or the gradient norm is not finite; the
                weights are then still those before. Every process raises.
        """
        lr = float(self.trained.scheduler.get_last_lr()[0])
        totals = self._totals(own)
        count, tokens = totals.counted, totals.tokens
        batches = self._even(own, totals.sizes)
        if not batches:
            # A course that samples may find nothing worth learning; time goes on, weights stay.
            self.trained.scheduler.step()
            return Updated({"loss": 0.0, "grad_norm": 0.0, "lr": lr, "is_empty": 1.0})
        if count <= 0:
            self._fail(title, f"count of trained items = {count:g}, expected above 0", own)
        seeds = [self._seed(index, number) for number in range(len(batches))]
        losses = self._backward(list(zip(batches, seeds, strict=True)), len(own), count, tokens)
        shares = [_share(*pair, count, tokens) for pair in zip(losses, own, strict=True)]
        loss, aux, norm = self._read(shares, self._gradient_norm())
        if not math.isfinite(loss + aux):
            bad = [b for b, share in zip(own, shares, strict=True) if not share.isfinite().all()]
            self._fail(title, f"loss = {loss + aux}, expected a finite number", bad)
        if not math.isfinite(norm):
            self._fail(title, f"gradient norm = {norm}, expected a finite number", own)
        if self.rounds_gradients:
            self._round_gradients()
        self.trained.optimizer.step()
        self.trained.optimizer.zero_grad(set_to_none=True)
        self.trained.scheduler.step()
        metrics = {"loss": loss, "grad_norm": norm, "lr": lr} | ({"aux_loss": aux} if aux else {})
        return Updated(metrics, tuple(losses), tokens, totals.trained_tokens, totals.operations)

    def _totals(self, own: Sequence[Batch]) -> _Totals:
        mine = (
            float(sum(self.course.count(batch) for batch in own)),
            float(sum(batch.packed.num_tokens for batch in own)),
            float(sum(int((batch.weights != 0).sum()) for batch in own)),
            float(sum(self.operations(batch.packed.lengths) for batch in own)),
        )
        # rows that several processes share are told by each of them
        told: list[Any] = [(mine, len(own))]
        if self.hosts is not None:
            told = told * self.accelerator.num_processes
            dist.all_gather_object(told, (mine, len(own)), group=self.hosts)
        counted, tokens, trained, operations = (
            sum(values) / self.mesh.sequence.size
            for values in zip(*(numbers for numbers, _ in told), strict=True)
        )
        return _Totals(counted, tokens, trained, operations, tuple(size for _, size in told))

    def _even(self, own: Sequence[Batch], sizes: Sequence[int]) -> list[Batch]:
        """As many microbatches on each process, this process's own first.

        A process with fewer repeats its last with weight 0, so that collectives inside forward and
        backward meet; a process with none borrows one.
        """
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return list(own)
        most = max(sizes)
        filler = list(own[-1:])
        if most and min(sizes) == 0:
            lender = sizes.index(most)
            lent: list[Any] = filler if accelerator.process_index == lender else [None]
            broadcast_object_list(lent, from_process=lender)
            filler = filler or lent
        return [*own, *filler * (most - len(own))]

    def _seed(self, index: int, number: int) -> int:
        """Of the random numbers of this process's microbatch `number`, wherever it is computed.

        Processes that share a row hold other tokens of it, and draw other numbers.
        """
        sequence = self.mesh.sequence
        row = self.accelerator.process_index // sequence.size
        place = number * self._rows_at_once + row
        return random.Random(f"{self.seed}/{index}/{place}/{sequence.rank}").getrandbits(63)

    def _backward(
        self, batches: Sequence[tuple[Batch, int]], num_own: int, count: float, tokens: float
    ) -> list[Loss]:
        """Accumulates gradients; the losses of this process's own microbatches, which come first.

        Args:
            batches: each with its seed.
        """
        accelerator, model = self.accelerator, self.trained.model
        losses: list[Loss] = []
        for number, (batch, seed) in enumerate(batches):
            is_last = number == len(batches) - 1
            torch.manual_seed(seed)
            with nullcontext() if is_last else accelerator.no_sync(model):
                with self._autocast():
                    loss = self.course.loss(model, batch.to(accelerator.device))
                share = _share(loss, batch, count, tokens).sum()
                scale = self._rows_at_once if number < num_own else 0
                accelerator.backward(share * scale)
            if number < num_own:
                losses.append(_detached(loss))
        average_expert_gradients(model, self.mesh)
        return losses

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.has_autocast:
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)

    def _gradient_norm(self) -> Tensor:
        model: nn.Module = self.trained.model
        limit = self.clip_norm or math.inf
        if self.mesh.expert.size > 1:
            return clip_gradients(model, self.mesh, limit)
        norm = self.accelerator.clip_grad_norm_(model.parameters(), limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def _round_gradients(self) -> None:
        for parameter in self.trained.model.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(parameter.grad.bfloat16())

    def _read(self, shares: Sequence[Tensor], norm: Tensor) -> tuple[float, float, float]:
        """Loss, aux loss and gradient norm on the host: the one wait of an update."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for share in shares:
            sums += share
        sums = self.accelerator.reduce(sums, reduction="sum") / self.mesh.sequence.size
        loss, aux, norm_read = torch.cat((sums, norm.to(sums).view(1))).tolist()
        return loss, aux, norm_read

    @property
    def _rows_at_once(self) -> int:
        return self.accelerator.num_processes // self.mesh.sequence.size

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
    share = loss.sum / count
    if loss.aux is None:
        return torch.stack([share, torch.zeros_like(share)])
    return torch.stack([share, loss.aux * (batch.packed.num_tokens / tokens)])


def _detached(loss: Loss) -> Loss:
    aux = None if loss.aux is None else loss.aux.detach()
    return replace(loss, sum=loss.sum.detach(), aux=aux)
