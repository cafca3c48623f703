"""Tensors that lie on a process in several stretches come back on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from align.stretches import in_boxes, part_of
from tests.model.parallel.world import world

WHOLE = torch.arange(2 * 8 * 12, dtype=torch.float32).view(2, 8, 12)


class Layout(NamedTuple):
    """Ranks along each dim of a mesh, what each does to the tensor, and where it is written."""

    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]
    folder: Path


def write(layout: Layout) -> None:
    mesh = init_device_mesh("cpu", layout.mesh)
    sharded = DTensor.from_local(
        part_of(WHOLE, mesh, layout.placements),
        mesh,
        layout.placements,
        shape=WHOLE.shape,
        stride=WHOLE.stride(),
    )
    assert torch.equal(sharded.full_tensor(), WHOLE)
    contents = {"weights": {"a": sharded, "b": torch.ones(2)}}
    save(in_boxes(contents), storage_writer=FileSystemWriter(layout.folder))
    read = {"weights": {"a": torch.zeros_like(sharded), "b": torch.zeros(2)}}
    load(in_boxes(read), storage_reader=FileSystemReader(layout.folder))
    assert torch.equal(read["weights"]["a"].to_local(), sharded.to_local())
    assert torch.equal(read["weights"]["b"], torch.ones(2))


@pytest.mark.multi
@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((2,), (_StridedShard(1, split_factor=2),)),
        ((1, 2), (Replicate(), _StridedShard(2, split_factor=3))),
        ((2, 1), (Replicate(), _StridedShard(2, split_factor=3))),
        ((2,), (Shard(0),)),
    ],
)
def test_what_ranks_wrote_is_read_whole(
    mesh: tuple[int, ...], placements: tuple[Placement, ...], tmp_path: Path
):
    world(2, write, Layout(mesh, placements, tmp_path / "c"), tmp_path)
    read = {"weights": {"a": torch.zeros_like(WHOLE)}}
    load(read, storage_reader=FileSystemReader(tmp_path / "c"), no_dist=True)
    assert torch.equal(read["weights"]["a"], WHOLE)


@pytest.mark.multi
def test_stretches_along_two_dims_come_back(tmp_path: Path):
    placements = (_StridedShard(2, split_factor=3), _StridedShard(1, split_factor=2))
    world(4, write, Layout((2, 2), placements, tmp_path / "c"), tmp_path)
    read = {"weights": {"a": torch.zeros_like(WHOLE)}}
    load(read, storage_reader=FileSystemReader(tmp_path / "c"), no_dist=True)
    assert torch.equal(read["weights"]["a"], WHOLE)
