"""One packed row cut over the ranks of the sequence axis, in contiguous parts.

Lightning layers run LASP+: every rank runs its part from zero states, one all-gather tells all
ranks what state each part ends with, and the document that came over the border gets

    o_i += exp(-s (i + 1)) q_i S,    S = sum_j exp(-s tokens between) S_j

where j goes over the parts since the document's start. Only the first document of a part can have
come over a border. Backward is the same with one all-gather of gradients of S.

A row of T tokens gives each rank T / ranks of them, the first T % ranks ranks one more; nothing is
padded, and a row of fewer tokens than ranks is refused. Positions stay those in the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.lightning.op import lightning_attention
from model.packed import Packed, sent
from model.parallel.collectives import all_gather, gather_parts, sum_over
from model.parallel.mesh import Axis, Mesh
from model.row import Row

# What decayed below 2^-48 is below the last bit of an fp32 sum; the kernels leave it out as well.
_GONE = 48 * 0.6931471805599453
# Tokens whose share of the incoming state exists at once.
_PIECE = 8192


class ShardLengths(tuple[int, ...]):
    """Lengths of a part's documents, as far as they lie in it, and where the part lies in its row.

    It is the `lengths` of a part's `Packed`, so that it reaches every layer as lengths do.

    Args:
        row: tokens of each document of the whole row.
        rank: which of the parts; size: how many there are.

    Example:
        >>> part = ShardLengths((3, 4, 1), rank=1, size=2)
        >>> part, part.sizes, part.before, part.continues
        ((3, 1), (4, 4), (0, 1), False)
    """

    row: tuple[int, ...]
    rank: int
    sizes: tuple[int, ...]
    """Tokens of each part."""
    ends: tuple[int, ...]
    """Place in the row behind each part."""
    before: tuple[int, ...]
    """Tokens that each part's first document has in the parts before."""

    def __new__(cls, row: Sequence[int], *, rank: int, size: int) -> ShardLengths:
        total = sum(row)
        sizes = tuple(total // size + (r < total % size) for r in range(size))
        ends = tuple(accumulate(sizes))
        borders = [0, *accumulate(row)]
        own = (ends[rank] - sizes[rank], ends[rank])
        inside = [border for border in borders if own[0] < border < own[1]]
        cuts = [own[0], *inside, own[1]]
        made = super().__new__(cls, (b - a for a, b in pairwise(cuts)))
        made.row, made.rank, made.sizes, made.ends = tuple(row), rank, sizes, ends
        made.before = tuple(
            end - n - max(b for b in borders if b <= end - n)
            for end, n in zip(ends, sizes, strict=True)
        )
        return made

    @property
    def start(self) -> int:
        """Place in the row of the part's first token."""
        return self.ends[self.rank] - self.sizes[self.rank]

    @property
    def crosses(self) -> bool:
        """Whether any document of the row lies in more than one part."""
        return any(self.before)

    @property
    def continues(self) -> bool:
        """Whether the part's last document goes on in the next part."""
        return self.rank + 1 < len(self.sizes) and self.before[self.rank + 1] > 0

    def gap(self, later: int, earlier: int) -> int | None:
        """Tokens between two parts if one document spans both and all between; else None."""
        begin = self.ends[later] - self.sizes[later]
        if self.before[later] <= begin - self.ends[earlier]:
            return None
        return begin - self.ends[earlier]


def cut(packed: Packed, axis: Axis) -> Packed:
    """This rank's part of a row.

    Raises:
        ValueError: if the row is a part already, or has no token for some rank.
    """
    if isinstance(packed.lengths, ShardLengths):
        raise ValueError("packed.lengths are those of a part; give whole rows to a sharded model")
    if packed.num_tokens < axis.size:
        raise ValueError(
            f"packed holds {packed.num_tokens} tokens, expected one or more for each of "
            f"parallel.sequence = {axis.size} ranks; lower it or leave the row out"
        )
    lengths = ShardLengths(packed.lengths, rank=axis.rank, size=axis.size)
    own = slice(lengths.start, lengths.ends[axis.rank])
    return Packed(packed.tokens[own], packed.positions[own], lengths)


def _part_of(own: Packed) -> ShardLengths:
    assert isinstance(own.lengths, ShardLengths), "made by cut"
    return own.lengths


@dataclass(frozen=True)
class CutRow(Row):
    """A row that the ranks of `mesh.sequence` share.

    Args:
        counted: the ranks whose tokens routing counts.
    """

    mesh: Mesh
    counted: Axis

    def own(self, packed: Packed) -> Packed:
        return cut(packed, self.mesh.sequence) if self.mesh.sequence.size > 1 else packed

    def part(self, x: Tensor, own: Packed) -> Tensor:
        if self.mesh.sequence.size == 1:
            return x
        lengths = _part_of(own)
        return x[lengths.start : lengths.ends[lengths.rank]]

    def whole(self, x: Tensor, own: Packed) -> Tensor:
        if self.mesh.sequence.size == 1:
            return x
        return gather_parts(x, _part_of(own).sizes, self.mesh.sequence)

    def take(self, x: Tensor, places: Sequence[int], own: Packed) -> Tensor:
        if self.mesh.sequence.size == 1:
            return super().take(x, places, own)
        start, end = _part_of(own).start, _part_of(own).start + x.shape[0]
        mine = [n for n, place in enumerate(places) if start <= place < end]
        found = super().take(x, [places[n] - start for n in mine], own)
        rows = sent(torch.tensor(mine, dtype=torch.int64), x.device)
        room = x.new_zeros(len(places), *x.shape[1:]).index_copy(0, rows, found)
        return sum_over(room, self.mesh.sequence)

    def mean(self, x: Tensor, tokens: int) -> Tensor:
        if self.counted.size == 1:
            return x
        weighed = torch.cat([(x * tokens).flatten(), x.new_full((1,), float(tokens))])
        total = sum_over(weighed, self.counted)
        return (total[:-1] / total[-1].detach()).view_as(x)


@dataclass(frozen=True)
class LightningShare:
    """LASP+; takes the place of a lightning layer's core.

    Args:
        slowest: smallest slope of the layer's heads.
    """

    axis: Axis
    slowest: float

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
    ) -> tuple[Tensor, Tensor | None]:
        """As `lightning_attention`, on this rank's part of q, k, v.

        Returns: o [T', H, D] and, if wanted, the state of each of the part's documents at its end
            or at the part's.

        Raises:
            ValueError: if an initial state is given for a part.
        """
        if not isinstance(lengths, ShardLengths) or not lengths.crosses:
            return lightning_attention(
                q, k, v, slopes, lengths, initial_state=initial_state, with_final=with_final
            )
        if initial_state is not None:
            raise ValueError("initial_state: not for a row cut over ranks; continue it on one rank")
        out, finals = _from_zero(q, k, v, slopes, lengths, with_final)
        incoming = _CarryStates.apply(finals[-1], slopes, lengths, self.axis)
        rows = 0
        if lengths.before[lengths.rank]:
            far = _GONE / self.slowest if self.slowest else lengths[0]
            rows = min(lengths[0], int(far) + 1)
        out = _AddIncoming.apply(out, q, incoming, slopes, rows)
        if not with_final:
            return out, None
        if rows:
            kept = torch.exp(-slopes.to(incoming.dtype) * lengths[0])[:, None, None]
            finals = torch.cat([finals[:1] + kept * incoming, finals[1:]])
        return out, finals


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


class _CarryStates(torch.autograd.Function):
    """Final state of each part's last document -> state that comes into this part's first."""

    @staticmethod
    def forward(
        ctx: Any, final: Tensor, slopes: Tensor, lengths: ShardLengths, axis: Axis
    ) -> Tensor:
        ctx.save_for_backward(slopes)
        ctx.lengths, ctx.axis = lengths, axis
        gaps = {j: lengths.gap(axis.rank, j) for j in range(axis.rank)}
        return _faded(all_gather(final, axis), slopes, _known(gaps))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        lengths, axis = ctx.lengths, ctx.axis
        gathered = all_gather(grad, axis)
        gaps = _known({j: lengths.gap(j, axis.rank) for j in range(axis.rank + 1, axis.size)})
        return _faded(gathered, slopes, gaps) if gaps else None, None, None, None


def _known(gaps: dict[int, int | None]) -> dict[int, int]:
    return {rank: tokens for rank, tokens in gaps.items() if tokens is not None}


class _AddIncoming(torch.autograd.Function):
    """out with what the incoming state gives to the first `rows` tokens.

    Applied on every rank, with 0 rows where nothing comes in: the backward of the carried states is
    a collective, and no rank may miss it.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, q: Tensor, incoming: Tensor, slopes: Tensor, rows: int
    ) -> Tensor:
        ctx.save_for_backward(q, incoming, slopes)
        ctx.rows = rows
        if not rows:
            return out.view_as(out)
        out = out.clone()
        # products in the dtype of q, which is what the kernels multiply states in
        state = incoming.to(q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            for piece, decay in _pieces(slopes, rows):
                added = (q[piece].transpose(0, 1) @ state).transpose(0, 1)
                out[piece] += (added * decay).to(out.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, incoming, slopes = ctx.saved_tensors
        to_incoming = torch.zeros_like(incoming)
        if not ctx.rows:
            return grad, None, to_incoming, None, None
        to_q = torch.zeros_like(q)
        state = incoming.to(q.dtype).mT
        with torch.autocast(q.device.type, enabled=False):
            for piece, decay in _pieces(slopes, ctx.rows):
                faded = (grad[piece] * decay).to(q.dtype).transpose(0, 1)
                to_q[piece] = (faded @ state).transpose(0, 1)
                to_incoming += q[piece].permute(1, 2, 0) @ faded
        return grad, to_q, to_incoming, None, None


def _pieces(slopes: Tensor, rows: int) -> list[tuple[slice, Tensor]]:
    """Stretches of the first rows, and what is left of the state at each: [rows, H, 1]."""
    pieces = []
    for start in range(0, rows, _PIECE):
        end = min(start + _PIECE, rows)
        place = torch.arange(start + 1, end + 1, device=slopes.device, dtype=slopes.dtype)
        pieces.append((slice(start, end), torch.exp(-place[:, None] * slopes)[..., None]))
    return pieces
