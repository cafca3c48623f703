"""Who computes what: chunks of tokens, segments of chunks, and the carries between segments.

A chunk holds up to `chunk_tokens` tokens of one sequence. A segment is a run of chunks that one
program does in order with its state on chip; there are as many as fill the device. Where a border
of two segments cuts a sequence, a carry is needed there: its pieces are summed first, in parallel.
All tables are made on the host from the host's lengths, once for all layers of a step.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

FIRST, LAST = 1 << 8, 1 << 9
"""Marks beside the token count of a chunk: it starts, it ends a sequence."""

SEGMENT_COST = 4
"""What a segment costs beside its chunks, in chunks: filling the pipeline, its carry."""


@dataclass(frozen=True)
class Direction:
    """The work of one pass, forwards or backwards in time.

    Args:
        segments: [G, 5] int32: first chunk, chunk after the last, row of the carry that enters or
            -1, sequence that begins (in the pass's time) at the segment's border or -1, sequence
            that ends there or -1.
        pieces: [P, 3] int32: first token, token after the last, token at the border.
        carries: [C, 5] int32, in the pass's time: first piece, piece after the last, tokens
            between the segment's two ends, whether the carry before it comes through, sequence.
    """

    segments: Tensor
    pieces: Tensor
    carries: Tensor

    @property
    def num_segments(self) -> int:
        return self.segments.shape[0]

    @property
    def num_pieces(self) -> int:
        return self.pieces.shape[0]

    @property
    def num_carries(self) -> int:
        return self.carries.shape[0]


@dataclass(frozen=True)
class Plan:
    """chunks: [N, 2] int32: first token; token count, with the marks FIRST and LAST."""

    chunks: Tensor
    forward: Direction
    backward: Direction


class FirstRows:
    """The first `count` of some rows as one sequence in a slot, planned on the device: a graph that
    was captured serves every count.

    Args:
        slot, count: [1] int64, count >= 1.

    Example:
        >>> rows = FirstRows(torch.tensor([3]), torch.tensor([70]))
        >>> chunks, work = rows.plan(128, chunk_tokens=64)
        >>> chunks.tolist(), work.segments.tolist()
        ([[0, 64], [64, 6]], [[0, 2, -1, 3, 3]])
    """

    def __init__(self, slot: Tensor, count: Tensor) -> None:
        self.slot, self.count = slot, count
        self._plans: dict[tuple[int, int], tuple[Tensor, Direction]] = {}

    def plan(self, rows: int, *, chunk_tokens: int) -> tuple[Tensor, Direction]:
        """Chunks as in `Plan`, and one segment of them; made once for all layers.

        States enter and leave by slot. Without marks: only passes without initial states read them.
        """
        key = rows, chunk_tokens
        if key not in self._plans:
            begin = torch.arange(0, rows, chunk_tokens, device=self.count.device)
            chunks = torch.stack([begin, (self.count - begin).clamp(0, chunk_tokens)], dim=1)
            used = (self.count + chunk_tokens - 1) // chunk_tokens
            zero = torch.zeros_like(used)
            segments = torch.stack([zero, used, zero - 1, self.slot, self.slot], dim=1).int()
            none = segments[:0]
            self._plans[key] = chunks.int(), Direction(segments, none, none)
        return self._plans[key]


@dataclass(frozen=True)
class _Layout:
    starts: list[int]
    counts: list[int]
    owners: list[int]
    ends: list[int]


@functools.lru_cache(maxsize=256)
def plan_work(
    lengths: tuple[int, ...],
    *,
    heads: int,
    programs: int,
    chunk_tokens: int,
    is_split: bool,
    device: torch.device,
) -> Plan:
    """The tables for these lengths.

    Args:
        lengths: tokens of each sequence, >= 1.
        heads: programs that each segment needs.
        programs: programs that the device runs at once.
        chunk_tokens: most tokens of a chunk, <= 255.
        is_split: whether a segment may hold one sequence only, as states that enter or leave a
            sequence need.

    Example:
        >>> cpu = torch.device("cpu")
        >>> plan = plan_work(
        ...     (70, 3), heads=1, programs=2, chunk_tokens=64, is_split=False, device=cpu)
        >>> plan.chunks[:, 0].tolist(), (plan.chunks[:, 1] & 255).tolist()
        ([0, 64, 70], [64, 6, 3])
    """
    seq_starts = [0, *accumulate(lengths)]
    starts, counts, owners, meta = [], [], [], []
    for owner, (begin, end) in enumerate(pairwise(seq_starts)):
        for start in range(begin, end, chunk_tokens):
            count = min(chunk_tokens, end - start)
            starts.append(start)
            counts.append(count)
            owners.append(owner)
            meta.append(count + FIRST * (start == begin) + LAST * (start + chunk_tokens >= end))
    layout = _Layout(starts, counts, owners, seq_starts)
    borders = _borders(owners, heads, programs, is_split)
    # a piece is short enough that all heads' pieces fill the device several times
    cut = sum(not meta[border] & FIRST for border in borders[1:-1])
    tokens = seq_starts[-1] * cut * heads // max(len(borders) - 1, 1)
    piece_tokens = max(256, -(-tokens // (6 * programs) // 64) * 64)
    return Plan(
        _to_device(list(zip(starts, meta, strict=True)), 2, device),
        _forward(layout, borders, piece_tokens, device),
        _backward(layout, borders, piece_tokens, device),
    )


def _to_device(rows: Sequence[Sequence[int]], columns: int, device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=torch.int32).view(-1, columns)
    if device.type != "cuda":
        return table
    # from pinned memory, so that the host does not wait for the device
    return table.pin_memory().to(device, non_blocking=True)


def _borders(owners: list[int], heads: int, programs: int, is_split: bool) -> list[int]:
    """First chunk of each segment, and the number of chunks at the end."""
    total = len(owners)
    cost = {
        count: -(-count * heads // programs) * (-(-total // count) + SEGMENT_COST)
        for count in range(1, min(total, max(4 * programs // heads, 1)) + 1)
    }
    count = min(cost, key=lambda key: (cost[key], key))
    if not is_split:
        return [total * part // count for part in range(count + 1)]
    size = -(-total // count)
    borders, begin = [0], 0
    while begin < total:
        end = bisect_right(owners, owners[begin])
        parts = -(-(end - begin) // size)
        borders += [begin + (end - begin) * part // parts for part in range(1, parts + 1)]
        begin = end
    return borders


def _is_first(layout: _Layout, chunk: int) -> bool:
    return layout.starts[chunk] == layout.ends[layout.owners[chunk]]


def _is_last(layout: _Layout, chunk: int) -> bool:
    return layout.starts[chunk] + layout.counts[chunk] == layout.ends[layout.owners[chunk] + 1]


def _forward(
    layout: _Layout, borders: list[int], piece_tokens: int, device: torch.device
) -> Direction:
    segments: list[tuple[int, ...]] = []
    pieces: list[tuple[int, ...]] = []
    carries: list[tuple[int, ...]] = []
    for index, (low, high) in enumerate(pairwise(borders)):
        row, owner, starts = -1, layout.owners[low], _is_first(layout, low)
        if not starts:
            border = layout.starts[low]
            segment_begin = layout.starts[borders[index - 1]]
            seq_begin = layout.ends[owner]
            begin = max(segment_begin, seq_begin)
            row, first = len(carries), len(pieces)
            pieces += [
                (at, min(at + piece_tokens, border), border)
                for at in range(begin, border, piece_tokens)
            ]
            through = seq_begin < segment_begin
            carries.append((first, len(pieces), border - begin, int(through), owner))
        leaves = layout.owners[high - 1] if _is_last(layout, high - 1) else -1
        segments.append((low, high, row, owner if starts else -1, leaves))
    return _direction(segments, pieces, carries, device)


def _backward(
    layout: _Layout, borders: list[int], piece_tokens: int, device: torch.device
) -> Direction:
    segments: list[tuple[int, ...]] = []
    pieces: list[tuple[int, ...]] = []
    carries: list[tuple[int, ...]] = []
    for index in range(len(borders) - 2, -1, -1):
        low, high = borders[index], borders[index + 1]
        row, owner, ends = -1, layout.owners[high - 1], _is_last(layout, high - 1)
        if not ends:
            border = layout.starts[high]
            last = borders[index + 2] - 1
            segment_end = layout.starts[last] + layout.counts[last]
            seq_end = layout.ends[owner + 1]
            end = min(segment_end, seq_end)
            row, first = len(carries), len(pieces)
            pieces += [
                (at, min(at + piece_tokens, end), border) for at in range(border, end, piece_tokens)
            ]
            through = seq_end > segment_end
            carries.append((first, len(pieces), end - border, int(through), owner))
        leaves = layout.owners[low] if _is_first(layout, low) else -1
        segments.append((low, high, row, owner if ends else -1, leaves))
    return _direction(segments, pieces, carries, device)


def _direction(
    segments: list[tuple[int, ...]],
    pieces: list[tuple[int, ...]],
    carries: list[tuple[int, ...]],
    device: torch.device,
) -> Direction:
    return Direction(
        _to_device(segments, 5, device),
        _to_device(pieces, 3, device),
        _to_device(carries, 5, device),
    )
