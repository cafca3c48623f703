"""Tokens to rows that lie by expert, and back: what an expert layer does around its products.

On CUDA by the kernels of `launch.py`; nothing waits for the device, and sums are fp32 in the order
of a token's experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where each of the T * K places went.

    Args:
        ends: [E] int32, where each expert's rows end.
        position: [T * K] int32, row of a place; -1 where it is dropped.
        place: [T * K] int32, place of a row; of no meaning after the last row.
    """

    ends: Tensor
    position: Tensor
    place: Tensor


def sort_places(chosen: Tensor, num_experts: int) -> Places:
    """[T, K] int64 in 0..E, E where dropped -> rows by expert, in each the order of the places.

    Example:
        >>> sort_places(torch.tensor([[1, 0], [1, 2]]), 2)[:2]
        (tensor([1, 3], dtype=torch.int32), tensor([ 1,  0,  2, -1], dtype=torch.int32))
    """
    if chosen.is_cuda and chosen.numel():
        # not at the top: torch for CPU comes without triton
        from model.kernels.experts import launch

        return launch.sort_places(chosen.contiguous(), num_experts)
    flat = chosen.flatten()
    ends = torch.bincount(flat, minlength=num_experts + 1)[:num_experts].cumsum(0)
    place = flat.argsort(stable=True)
    position = torch.empty_like(place)
    position[place] = torch.arange(len(place), device=place.device)
    position = position.masked_fill(flat == num_experts, -1)
    return Places(*(x.to(torch.int32) for x in (ends, position, place)))


def spread(x: Tensor, places: Places) -> Tensor:
    """[T, C] -> [T * K, C]: each token copied to its rows; the last are undefined where dropped."""
    if x.is_cuda and x.numel():
        from model.kernels.experts import launch

        return launch.spread(x if x.stride(-1) == 1 else x.contiguous(), places.position)
    top_k = len(places.position) // max(len(x), 1)
    return x.index_select(0, places.place // max(top_k, 1))


def combine(rows: Tensor, places: Places, tokens: int) -> Tensor:
    """[rows, C], as many as are not dropped -> [T, C]: the sum of each token's rows."""
    if rows.is_cuda and rows.numel():
        from model.kernels.experts import launch

        return launch.combine(rows.contiguous(), places.position, None, tokens)
    room = rows.new_zeros(len(places.place), rows.shape[1])
    room.index_copy_(0, places.place[: len(rows)].long(), rows)
    # not -1: torch cannot tell how many places each of no token has
    return room.view(tokens, len(room) // max(tokens, 1), rows.shape[1]).sum(1)
