"""Ring attention over a row that is cut over ranks, each rank with as much to do as the others.

Parts are contiguous, because lightning layers need them so, and a causal mask would give the last
rank most of the work. So the row is cut again, into 2 R chunks, of which rank r attends from chunks
r and 2 R - 1 - r (zig-zag); queries, keys and values travel there, and the output back. Then keys
and values go round: in step s a rank has those of rank r - s, and meets exactly two pairs of chunks
in each step of a row of one document.

Packed documents need no mask. Of two chunks, only the first document of the later can reach back to
the earlier, and only to its last: a rectangle in which every query sees every key. What no document
of the receiver reaches is not sent. Pieces merge by their log-sum-exp (`merge_attention`); backward
sends keys and values round once more and their gradients home.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.attention.op import (
    merge_attention,
    packed_attention_backward,
    packed_attention_lse,
)
from model.parallel.collectives import Voyage
from model.parallel.mesh import Axis
from model.parallel.sequence import ShardLengths


def attend_by_ring(q: Tensor, k: Tensor, v: Tensor, lengths: ShardLengths, *, axis: Axis) -> Tensor:
    """As `packed_attention`, on this rank's part of q, k, v: [T', H, D]."""
    return _Ring.apply(q, k, v, _plan(lengths.row, axis.rank, axis.size), axis)


class Chunk(NamedTuple):
    """Chunk of a row: where it begins and ends, and where its first document begins."""

    start: int
    end: int
    begin: int
    lengths: tuple[int, ...]


class Rectangle(NamedTuple):
    """Queries of a chunk here, and the keys before it that they all see.

    Args:
        queries: rows here; keys: of the rows that came.
    """

    queries: slice
    keys: slice


Route = list[list[slice]]


@dataclass(frozen=True)
class Plan:
    """What one rank does; all of it known on the host.

    Args:
        lengths: segments of documents in the two chunks here.
        leaves, lands: by rank, rows of the part that go to its chunks, and where in the chunks here
            the rows of its part lie.
        tokens: of the part, and of the chunks here.
        inside: the rectangle between the two chunks here, if there is one.
        tails: by step, rows here that go to the rank of that many steps ahead.
        steps: by step, rectangles with what came from the rank of that many steps back, and how
            many rows came.
    """

    lengths: tuple[int, ...]
    leaves: Route
    lands: Route
    tokens: tuple[int, int]
    inside: tuple[Rectangle, ...]
    tails: tuple[list[slice], ...]
    steps: tuple[tuple[tuple[Rectangle, ...], int], ...]


@functools.lru_cache(maxsize=64)
def _plan(row: tuple[int, ...], rank: int, size: int) -> Plan:
    chunks = _cut(row, 2 * size)
    parts = [ShardLengths(row, rank=r, size=size) for r in range(size)]
    intervals = [(p.start, p.ends[r]) for r, p in enumerate(parts)]
    own = intervals[rank]
    places = _places(chunks, _held(rank, size))
    leaves = [
        [s for c in _held(r, size) for s in _shared(own, chunks[c], own[0])] for r in range(size)
    ]
    lands = [
        [
            slice(at + s.start, at + s.stop)
            for c, at in places.items()
            for s in _shared((chunks[c].start, chunks[c].end), _interval(i), chunks[c].start)
        ]
        for i in intervals
    ]
    low, high = _held(rank, size)
    inside = _rectangles(chunks, places, _tails(chunks, [low], [high]))
    tails, steps = [], []
    for step in range(1, size):
        ahead, back = (rank + step) % size, (rank - step) % size
        sent = _tails(chunks, _held(rank, size), _held(ahead, size))
        tails.append(
            [
                slice(places[c] + _size(chunks[c]) - rows, places[c] + _size(chunks[c]))
                for c, rows, _ in sent
            ]
        )
        came = _tails(chunks, _held(back, size), [low, high])
        # rows that came lie one behind the other
        starts = dict(zip([c for c, _, _ in came], _starts([n for _, n, _ in came]), strict=True))
        steps.append((_rectangles(chunks, places, came, starts), sum(n for _, n, _ in came)))
    held = [chunks[low], chunks[high]]
    return Plan(
        lengths=tuple(n for chunk in held for n in chunk.lengths),
        leaves=leaves,
        lands=lands,
        tokens=(own[1] - own[0], sum(map(_size, held))),
        inside=inside,
        tails=tuple(tails),
        steps=tuple(steps),
    )


def _cut(row: Sequence[int], count: int) -> list[Chunk]:
    total, borders = sum(row), [0, *accumulate(row)]
    chunks = []
    for number in range(count):
        start, end = total * number // count, total * (number + 1) // count
        inside = [border for border in borders if start < border < end]
        cuts = [start, *inside, end] if end > start else []
        begin = max(border for border in borders if border <= start)
        chunks.append(Chunk(start, end, begin, tuple(b - a for a, b in pairwise(cuts))))
    return chunks


def _held(rank: int, size: int) -> list[int]:
    return [rank, 2 * size - 1 - rank]


def _size(chunk: Chunk) -> int:
    return chunk.end - chunk.start


def _interval(pair: tuple[int, int]) -> Chunk:
    return Chunk(*pair, pair[0], ())


def _starts(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))[:-1]


def _places(chunks: Sequence[Chunk], held: Sequence[int]) -> dict[int, int]:
    """First row of each chunk that a rank holds."""
    return dict(zip(held, _starts([_size(chunks[c]) for c in held]), strict=True))


def _shared(one: tuple[int, int], other: Chunk, origin: int) -> list[slice]:
    """What two stretches of the row share, counted from `origin`; nothing or one slice."""
    start, end = max(one[0], other.start), min(one[1], other.end)
    return [slice(start - origin, end - origin)] if end > start else []


def _tails(
    chunks: Sequence[Chunk], keys: Sequence[int], queries: Sequence[int]
) -> list[tuple[int, int, list[int]]]:
    """Chunks of keys that documents of `queries` reach: how many last rows, and by which chunks."""
    found = []
    for c in keys:
        readers = [
            late
            for late in queries
            if late > c and _size(chunks[late]) and chunks[late].begin < chunks[c].end
        ]
        rows = 0
        if readers:
            # all of them continue one document, the last of the chunk of keys
            rows = chunks[c].end - max(chunks[c].start, chunks[readers[0]].begin)
        if rows:
            found.append((c, rows, readers))
    return found


def _rectangles(
    chunks: Sequence[Chunk],
    places: dict[int, int],
    tails: Sequence[tuple[int, int, list[int]]],
    starts: dict[int, int] | None = None,
) -> tuple[Rectangle, ...]:
    found = []
    for c, rows, readers in tails:
        first = places[c] + _size(chunks[c]) - rows if starts is None else starts[c]
        found += [
            Rectangle(
                slice(places[late], places[late] + chunks[late].lengths[0]),
                slice(first, first + rows),
            )
            for late in readers
        ]
    return tuple(found)


def _rows(way: Route) -> list[int]:
    return [sum(s.stop - s.start for s in route) for route in way]


def _travel(x: Tensor, leaves: Route, lands: Route, rows: int, axis: Axis) -> Tensor:
    """All-to-all of slices: leaves[r] go to rank r, and what comes from it goes to lands[r]."""
    # with an empty slice, because torch joins no empty list
    gone = torch.cat([x[:0], *(x[s] for route in leaves for s in route)])
    voyage = Voyage(_rows(leaves), _rows(lands), axis)
    voyage.go(gone, is_back=False)
    came = voyage.come()
    out, start = x.new_empty(rows, *x.shape[1:]), 0
    for route in lands:
        for s in route:
            out[s] = came[start : start + s.stop - s.start]
            start += s.stop - s.start
    return out


class _Round:
    """Keys and values on their way round; in backward their gradients too."""

    def __init__(self, kv: Tensor, plan: Plan, axis: Axis) -> None:
        self.kv, self.plan, self.axis = kv, plan, axis
        self.voyages = [self._voyage(step) for step in range(len(plan.steps))]

    def _voyage(self, step: int) -> Voyage:
        size, rank = self.axis.size, self.axis.rank
        send, receive = [0] * size, [0] * size
        send[(rank + step + 1) % size] = sum(s.stop - s.start for s in self.plan.tails[step])
        receive[(rank - step - 1) % size] = self.plan.steps[step][1]
        return Voyage(send, receive, self.axis)

    def depart(self, step: int) -> None:
        """Every rank calls it for every step, also with nothing to send."""
        if step < len(self.voyages):
            tails = torch.cat([self.kv[:0], *(self.kv[s] for s in self.plan.tails[step])])
            self.voyages[step].go(tails, is_back=False)

    def arrive(self, step: int) -> Tensor:
        return self.voyages[step].come()

    def send_home(self, step: int, grad: Tensor) -> None:
        self.voyages[step].go(grad, is_back=True)

    def add_home(self, step: int, onto: Tensor) -> None:
        """Adds the gradients of what left in `step`."""
        came, start = self.voyages[step].come(), 0
        for s in self.plan.tails[step]:
            onto[s] += came[start : start + s.stop - s.start]
            start += s.stop - s.start


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, axis: Axis) -> Tensor:
        heads = q.shape[1]
        row = _travel(torch.cat([q, k, v], 1), plan.leaves, plan.lands, plan.tokens[1], axis)
        q, kv = row[:, :heads], row[:, heads:].contiguous()
        around = _Round(kv, plan, axis)
        around.depart(0)
        k, v = kv.chunk(2, dim=1)
        out, lse = _attend(q, k, v, plan.lengths)
        _merge(out, lse, q, kv, plan.inside)
        for step, (rectangles, _) in enumerate(plan.steps):
            came = around.arrive(step)
            around.depart(step + 1)
            _merge(out, lse, q, came, rectangles)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.plan, ctx.axis = plan, axis
        return _travel(out, plan.lands, plan.leaves, plan.tokens[0], axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        plan, axis = ctx.plan, ctx.axis
        grad = _travel(grad, plan.leaves, plan.lands, plan.tokens[1], axis)
        around = _Round(kv, plan, axis)
        around.depart(0)
        k, v = kv.chunk(2, dim=1)
        to_q, to_k, to_v = (
            packed_attention_backward(grad, q, k, v, out, lse, plan.lengths)
            if len(q)
            else (q, k, v)
        )
        # fp32: many pieces are added
        to_q, to_kv = _wide(to_q), _wide(torch.cat([to_k, to_v], 1))

        def add(keys: Tensor, onto: Tensor, rectangles: Sequence[Rectangle]) -> None:
            for rows, columns in rectangles:
                k, v = keys[columns].chunk(2, dim=1)
                found = packed_attention_backward(
                    grad[rows], q[rows], k, v, out[rows], lse[rows],
                    [rows.stop - rows.start], key_lengths=[columns.stop - columns.start],
                )  # fmt: skip
                to_q[rows] += found[0]
                onto[columns] += torch.cat(found[1:], 1)

        add(kv, to_kv, plan.inside)
        for step, (rectangles, _) in enumerate(plan.steps):
            came = around.arrive(step)
            around.depart(step + 1)
            to_came = torch.zeros_like(came, dtype=to_kv.dtype)
            add(came, to_came, rectangles)
            around.send_home(step, to_came.to(kv.dtype))
        for step in range(len(plan.steps)):
            around.add_home(step, to_kv)
        both = torch.cat([to_q, to_kv], 1).to(q.dtype)
        both = _travel(both, plan.lands, plan.leaves, plan.tokens[0], axis)
        heads, groups = q.shape[1], k.shape[1]
        return *both.split([heads, groups, groups], dim=1), None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """out and lse in fp32, which pieces are merged into."""
    if not len(q):
        return _wide(q), _wide(q[..., 0])
    out, lse = packed_attention_lse(q, k, v, lengths)
    return _wide(out), lse.contiguous()


def _merge(
    out: Tensor, lse: Tensor, q: Tensor, kv: Tensor, rectangles: Sequence[Rectangle]
) -> None:
    for rows, columns in rectangles:
        k, v = kv[columns].chunk(2, dim=1)
        found = packed_attention_lse(
            q[rows], k, v, [rows.stop - rows.start], key_lengths=[columns.stop - columns.start]
        )
        out[rows], lse[rows] = merge_attention(out[rows], lse[rows], *found)
