"""LASP+: a lightning layer over a row that is cut over ranks.

Every rank runs its part from zero states, one all-gather tells all ranks what state each part ends
with, and the document that came over the border gets

    o_i += exp(-s (i + 1)) q_i S,    S = sum_j exp(-s tokens between) S_j

where j goes over the parts since the document's start. Only the first document of a part can have
come over a border. Backward is the same with one all-gather of gradients of S.

States travel while the layer computes what does not need them: `begin` sends, what it returns
waits. Between the two a layer has its output gate, in backward too, where the gradients of states
are on their way while the gate's are computed; so nothing is cut smaller to have an overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.lightning.op import lightning_attention
from model.parallel.collectives import start_all_gather
from model.parallel.mesh import Axis
from model.parallel.sequence import ShardLengths

# What decayed below 2^-48 is below the last bit of an fp32 sum; the kernels leave it out as well.
_GONE = 48 * 0.6931471805599453
# Tokens whose share of the incoming state exists at once.
_PIECE = 8192

Attended = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class LightningShare:
    """LASP+; its `begin` takes the place of a lightning layer's.

    Args:
        slowest: smallest slope of the layer's heads.
        overlaps: whether states travel beside what is computed next; else they are waited for.
    """

    axis: Axis
    slowest: float
    overlaps: bool = True

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        lengths: Sequence[int],
        *,
        initial_state: Tensor | None = None,
        with_final: bool = False,
    ) -> Attended:
        """`begin` and its end at once."""
        return self.begin(
            q, k, v, slopes, lengths, initial_state=initial_state, with_final=with_final
        )()

    def begin(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        lengths: Sequence[int],
        *,
        initial_state: Tensor | None = None,
        with_final: bool = False,
    ) -> Callable[[], Attended]:
        """As `model.lightning.begin_attention`, on this rank's part of q, k, v.

        Returns: what gives o [T', H, D] and, if wanted, the state of each of the part's documents
            at its end or at the part's.

        Raises:
            ValueError: if an initial state is given for a part.
        """
        if not isinstance(lengths, ShardLengths) or not lengths.crosses:
            found = lightning_attention(
                q, k, v, slopes, lengths, initial_state=initial_state, with_final=with_final
            )
            return lambda: found
        if initial_state is not None:
            raise ValueError("initial_state: not for a row cut over ranks; continue it on one rank")
        part, own = lengths, _Journey(self.axis, lengths, self.overlaps)
        out, finals = _from_zero(q, k, v, slopes, part, with_final)
        gathered = _SendStates.apply(finals[-1], slopes, own)
        rows = 0
        if part.before[part.rank]:
            far = _GONE / self.slowest if self.slowest else part[0]
            rows = min(part[0], int(far) + 1)

        def end() -> Attended:
            whole, incoming = _AddIncoming.apply(out, q, gathered, slopes, own, rows)
            if not with_final:
                return whole, None
            if not rows:
                return whole, finals
            kept = torch.exp(-slopes.to(incoming.dtype) * part[0])[:, None, None]
            return whole, torch.cat([finals[:1] + kept * incoming, finals[1:]])

        return end


@dataclass
class _Journey:
    """States of all parts on their way to every rank, and later their gradients on the way back.

    Each direction is sent by one node of the graph and waited for by another, so that what the
    graph has between the two runs meanwhile.
    """

    axis: Axis
    lengths: ShardLengths
    overlaps: bool
    on_the_way: dist.Work | None = field(default=None, init=False)

    def send(self, x: Tensor) -> Tensor:
        """[..] -> [ranks, ..], not there before `arrive`."""
        gathered, self.on_the_way = start_all_gather(x, self.axis)
        if not self.overlaps:
            self.arrive()
        return gathered

    def arrive(self) -> None:
        if self.on_the_way is not None:
            self.on_the_way.wait()
            self.on_the_way = None

    def gaps(self, *, is_backward: bool) -> dict[int, int]:
        """Ranks whose states come in here (in backward: whose gradients), and tokens between."""
        own, ranks = self.axis.rank, self.axis.size
        if is_backward:
            found = {j: self.lengths.gap(j, own) for j in range(own + 1, ranks)}
        else:
            found = {j: self.lengths.gap(own, j) for j in range(own)}
        return {rank: tokens for rank, tokens in found.items() if tokens is not None}


def _from_zero(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, lengths: ShardLengths, with_all: bool
) -> tuple[Tensor, Tensor]:
    """Outputs of the part from zero states, and final states: all, or only the last one."""
    if with_all or len(lengths) == 1:
        out, finals = lightning_attention(q, k, v, slopes, tuple(lengths), with_final=True)
        assert finals is not None, "asked for by with_final"
        return out, finals
    # the last document on its own, because the states of all may be larger than the tokens
    last = lengths[-1]
    body, _ = lightning_attention(q[:-last], k[:-last], v[:-last], slopes, lengths[:-1])
    tail, final = lightning_attention(
        q[-last:], k[-last:], v[-last:], slopes, lengths[-1:], with_final=True
    )
    assert final is not None, "asked for by with_final"
    return torch.cat([body, tail]), final


def _faded(states: Tensor, slopes: Tensor, gaps: dict[int, int]) -> Tensor:
    """Sum of the ranks' states [ranks, H, D, D], each decayed over the tokens of its gap."""
    total = torch.zeros_like(states[0])
    for rank, tokens in gaps.items():
        total.addcmul_(states[rank], torch.exp(-slopes.to(total.dtype) * tokens)[:, None, None])
    return total


class _SendStates(torch.autograd.Function):
    """Final state of each part's last document -> those of all parts, on their way."""

    @staticmethod
    def forward(ctx: Any, final: Tensor, slopes: Tensor, journey: _Journey) -> Tensor:
        ctx.save_for_backward(slopes)
        ctx.journey = journey
        return journey.send(final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        """`grads` are those of all parts' incoming states, on their way as `_AddIncoming` sent."""
        (slopes,) = ctx.saved_tensors
        ctx.journey.arrive()
        gaps = ctx.journey.gaps(is_backward=True)
        return _faded(grads, slopes, gaps) if gaps else None, None, None


class _AddIncoming(torch.autograd.Function):
    """out with what the incoming state gives to the first `rows` tokens, and that state.

    Applied on every rank, with 0 rows where nothing comes in: its backward sends, and no rank may
    miss that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        q: Tensor,
        gathered: Tensor,
        slopes: Tensor,
        journey: _Journey,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        journey.arrive()
        incoming = _faded(gathered, slopes, journey.gaps(is_backward=False))
        ctx.save_for_backward(q, incoming, slopes)
        ctx.rows, ctx.journey = rows, journey
        ctx.set_materialize_grads(False)
        if not rows:
            return out.view_as(out), incoming
        out = out.clone()
        # products in the dtype of q, which is what the kernels multiply states in
        state = incoming.to(q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            for piece, decay in _pieces(slopes, rows):
                added = (q[piece].transpose(0, 1) @ state).transpose(0, 1)
                out[piece] += (added * decay).to(out.dtype)
        return out, incoming

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, to_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, incoming, slopes = ctx.saved_tensors
        to_incoming = torch.zeros_like(incoming) if to_state is None else to_state.clone()
        send = ctx.journey.send if ctx.needs_input_grad[2] else lambda _: None
        if not ctx.rows or grad is None:
            return grad, None, send(to_incoming), None, None, None
        state = incoming.to(q.dtype).mT
        with torch.autocast(q.device.type, enabled=False):
            pieces = _pieces(slopes, ctx.rows)
            for piece, decay in pieces:
                faded = (grad[piece] * decay).to(q.dtype).transpose(0, 1)
                to_incoming += q[piece].permute(1, 2, 0) @ faded
            sent = send(to_incoming)
            to_q = torch.zeros_like(q)
            for piece, decay in pieces:
                faded = (grad[piece] * decay).to(q.dtype).transpose(0, 1)
                to_q[piece] = (faded @ state).transpose(0, 1)
        return grad, to_q, sent, None, None, None


def _pieces(slopes: Tensor, rows: int) -> list[tuple[slice, Tensor]]:
    """Stretches of the first rows, and what is left of the state at each: [rows, H, 1]."""
    pieces = []
    for start in range(0, rows, _PIECE):
        end = min(start + _PIECE, rows)
        place = torch.arange(start + 1, end + 1, device=slopes.device, dtype=slopes.dtype)
        pieces.append((slice(start, end), torch.exp(-place[:, None] * slopes)[..., None]))
    return pieces
