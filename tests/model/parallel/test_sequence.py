"""A row cut over ranks is the row: outputs, gradients and final states."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels.attention.op import packed_attention
from model.kernels.lightning.op import lightning_attention
from model.packed import Packed
from model.parallel.lasp import LightningShare
from model.parallel.mesh import Axis, ParallelConfig, open_mesh
from model.parallel.ring import attend_by_ring
from model.parallel.sequence import ShardLengths, cut
from model.parallel.softmax import attend_by_heads, attend_by_keys, trades_heads
from tests.helpers import assert_close
from tests.model.parallel.lasp_serial import serial_lasp
from tests.model.parallel.world import world

# a length-1 document on every place of a border, one over all parts, unlike parts
ROWS = (
    *([16], [1, 15], [7, 1, 8], [1] * 8, [3, 30, 2], [4, 4, 4, 4], [2, 1, 1]),
    *([150, 1, 70, 90], [5]),
)
SLOPES = torch.tensor([0.7, 0.1, 0.004, 0.0])
HEADS, KV_HEADS, SIZE = 4, 2, 8
WINDOWS = (None, 5)


def inputs(total: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(total)
    shapes = [(total, h, SIZE) for h in (HEADS, HEADS, HEADS, HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def backward(out: Tensor, grad: Tensor, xs: list[Tensor]) -> list[Tensor]:
    (out * grad).sum().backward()
    return [out.detach(), *(x.grad for x in xs)]


def one_process(row: list[int]) -> list[Any]:
    *qkv, _, _, grad = (x.requires_grad_() for x in inputs(sum(row)))
    out, finals = lightning_attention(*qkv[:3], SLOPES, row, with_final=True)
    results = [[*backward(out, grad.detach(), qkv[:3]), finals.detach()]]
    for window in WINDOWS:
        xs = [x.requires_grad_() for x in inputs(sum(row))[3:6]]
        out = packed_attention(*xs, row, window=window)
        results.append(backward(out, grad.detach(), xs))
    return results


def parts(lengths: ShardLengths) -> list[Tensor]:
    own = slice(lengths.start, lengths.ends[lengths.rank])
    return [x[own].clone().requires_grad_() for x in inputs(sum(lengths.row))]


def on_ranks(rows: list[list[int]]) -> list[Any]:
    """Results of this rank's part of each row, in the order of `one_process`."""
    axis = open_mesh(ParallelConfig(sequence=dist.get_world_size()), device_type="cpu").sequence
    results = []
    for row in rows:
        lengths = ShardLengths(row, rank=axis.rank, size=axis.size)
        *xs, grad = parts(lengths)
        share = LightningShare(axis, slowest=float(SLOPES.min()))
        out, finals = share(*xs[:3], SLOPES, lengths, with_final=True)
        found = [[*backward(out, grad.detach(), xs[:3]), finals.detach()]]
        plain = parts(lengths)
        out, _ = share(*plain[:3], SLOPES, lengths)
        found.append(backward(out, grad.detach(), plain[:3]))
        for window in WINDOWS:
            by_heads = (
                attend_by_heads if trades_heads(HEADS, KV_HEADS, axis.size) else attend_by_keys
            )
            for attend in (by_heads, attend_by_keys):
                xs = parts(lengths)[3:6]
                out = attend(*xs, lengths, axis=axis, window=window)
                found.append(backward(out, grad.detach(), xs))
        xs = parts(lengths)[3:6]
        found.append(backward(attend_by_ring(*xs, lengths, axis=axis), grad.detach(), xs))
        xs = parts(lengths)[:3]
        out = serial_lasp(xs, SLOPES, lengths, axis=axis, grad=grad.detach())
        found.append([out, *(x.grad for x in xs)])
        results.append(found)
    return results


def check(rows: list[list[int]], ranks: int, folder: Path) -> None:
    found = world(ranks, on_ranks, rows, folder)
    for number, row in enumerate(rows):
        lightning, whole, windowed = one_process(row)
        wanted = [lightning[:4]] * 2 + [whole] * 2 + [windowed] * 2 + [whole, lightning[:4]]
        for kind, reference in enumerate(wanted):
            for place, one in enumerate(reference):
                joined = torch.cat([rank[number][kind][place] for rank in found])
                assert_close(f"{row}: {kind}, {place}", joined, one)
        ends = torch.tensor(row).cumsum(0).tolist()
        for rank in range(ranks):
            lengths = ShardLengths(row, rank=rank, size=ranks)
            states, place = found[rank][number][0][4], lengths.start
            for local, state in zip(lengths, states, strict=False):
                place += local
                if place in ends:
                    assert_close(f"{row}: state", state, lightning[4][ends.index(place)])


@pytest.mark.multi
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_one(ranks: int, tmp_path: Path):
    check([list(row) for row in ROWS], ranks, tmp_path)


@pytest.mark.multi
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=9), min_size=8, max_size=8),
    ranks=st.sampled_from([2, 3, 4]),
)
def test_wherever_documents_begin_and_end(rows: list[list[int]], ranks: int):
    with tempfile.TemporaryDirectory() as folder:
        check([row for row in rows if sum(row) >= ranks], ranks, Path(folder))


@pytest.mark.parametrize(("row", "size"), [(r, n) for r in ROWS for n in (1, 2, 3, 4)])
def test_parts_of_a_row_are_the_row(row: list[int], size: int):
    packed = Packed.from_sequences([range(n) for n in row])
    parts = [cut(packed, Axis(size, rank)) for rank in range(size)]
    assert torch.cat([part.tokens for part in parts]).equal(packed.tokens)
    assert torch.cat([part.positions for part in parts]).equal(packed.positions)
    joined: list[int] = []
    for part in parts:
        came = part.positions[0] > 0
        assert came == (part.lengths.before[part.lengths.rank] > 0)
        joined += part.lengths
        if came:
            joined[-len(part.lengths) - 1 :] = [
                joined[-len(part.lengths) - 1] + part.lengths[0],
                *part.lengths[1:],
            ]
    assert tuple(joined) == packed.lengths


def test_a_part_is_not_cut_again():
    part = cut(Packed.from_sequences([[1, 2, 3]]), Axis(2, 0))
    with pytest.raises(ValueError, match="give whole rows to a sharded model"):
        cut(part, Axis(2, 0))


def test_a_row_has_a_token_for_each_rank():
    with pytest.raises(ValueError, match=r"holds 3 tokens, .* parallel.sequence = 4 ranks"):
        cut(Packed.from_sequences([[1, 2], [3]]), Axis(4, 0))


def test_a_part_takes_no_initial_state():
    lengths = ShardLengths((4,), rank=0, size=2)
    x = torch.zeros(2, 1, 2)
    with pytest.raises(ValueError, match="initial_state: not for a row cut over ranks"):
        LightningShare(Axis(2, 0), 0.1)(
            x, x, x, torch.zeros(1), lengths, initial_state=torch.zeros(1, 1, 2, 2)
        )
