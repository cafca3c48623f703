"""Tensors of which a process holds several stretches, as torch's checkpoints take them.

A process may hold one stretch of gate's rows and the same of up's, or its experts' columns of each
of an adapter's ranks. torch notes one box a process, so such a tensor is given to it as the boxes
that it is made of; all others as they are. What is saved so is read on any layout, and the other
way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard


class Stretch(NamedTuple):
    """Neighbours along one dim: where they lie in the whole and on this process, and how many."""

    whole: int
    own: int
    length: int


def stretches(
    length: int, dim: int, placements: Sequence[Placement], place: Sequence[tuple[int, int]]
) -> list[Stretch]:
    """What a process holds along one dim of a whole tensor.

    Args:
        length: of the dim.
        placements: of the tensor; lengths divide evenly.
        place: own rank and number of ranks, along each dim of the mesh.

    Example:
        >>> stretches(8, 0, [_StridedShard(0, split_factor=2)], [(1, 2)])
        [Stretch(whole=2, own=0, length=2), Stretch(whole=6, own=2, length=2)]
    """
    held = list(range(length))
    for placement, (rank, size) in zip(placements, place, strict=True):
        if not isinstance(placement, Shard | _StridedShard) or placement.dim != dim:
            continue
        blocks = placement.split_factor if isinstance(placement, _StridedShard) else 1
        share = len(held) // (blocks * size)
        starts = [(block * size + rank) * share for block in range(blocks)]
        held = [place for start in starts for place in held[start : start + share]]
    found: list[Stretch] = []
    for own, whole in enumerate(held):
        if found and whole == found[-1].whole + found[-1].length:
            found[-1] = found[-1]._replace(length=found[-1].length + 1)
        else:
            found.append(Stretch(whole, own, 1))
    return found


def part_of(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """A copy of what this process holds of a tensor that is whole on all."""
    found = whole
    for dim, held in enumerate(_along_dims(whole.shape, mesh, placements)):
        pieces = [found.narrow(dim, s.whole, s.length) for s in held]
        found = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return found.clone(memory_format=torch.contiguous_format)


def _along_dims(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]
) -> list[list[Stretch]]:
    place = [(mesh.get_local_rank(n), mesh.size(n)) for n in range(mesh.ndim)]
    return [stretches(length, dim, placements, place) for dim, length in enumerate(shape)]


class _InBoxes(torch.Tensor):
    """A stand-in of the whole's shape that knows its boxes here (torch's `_Checkpointable`)."""

    boxes: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(cls, tensor: DTensor, boxes: dict[torch.Size, Tensor]) -> _InBoxes:
        made: _InBoxes = torch.Tensor._make_wrapper_subclass(
            cls, tensor.shape, dtype=tensor.dtype, device=tensor.device
        )
        made.boxes = boxes
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise TypeError(f"{func}: boxes are saved and loaded, not computed with")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, boxes at {[*self.boxes]})"

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.boxes[chunk.offsets]),
                    size=self.size(),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(at, box.size()) for at, box in self.boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, "made by a write item or a chunk"
        return self.boxes[index.offset]


def in_boxes(contents: Any) -> Any:
    """The same, with every tensor that lies here in several stretches given as boxes of views.

    Args:
        contents: a tree of dicts.
    """
    if isinstance(contents, dict):
        return {key: in_boxes(value) for key, value in contents.items()}
    if not isinstance(contents, DTensor):
        return contents
    boxes = dict(_boxes(contents))
    return _InBoxes(contents, boxes) if len(boxes) > 1 else contents


def _boxes(tensor: DTensor) -> Iterator[tuple[torch.Size, Tensor]]:
    if not any(isinstance(placement, _StridedShard) for placement in tensor.placements):
        return
    local = tensor.to_local().detach()
    for box in product(*_along_dims(tensor.shape, tensor.device_mesh, tensor.placements)):
        view = local[tuple(slice(s.own, s.own + s.length) for s in box)]
        yield torch.Size(s.whole for s in box), view
