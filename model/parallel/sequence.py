"""One packed row cut over the ranks of the sequence axis, in contiguous parts.

A row of T tokens gives each rank T / ranks of them, the first T % ranks ranks one more; nothing is
padded, and a row of fewer tokens than ranks is refused. Positions stay those in the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from model.packed import Packed, sent
from model.parallel.collectives import gather_parts, sum_over
from model.parallel.mesh import Axis, Mesh
from model.row import Row


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
