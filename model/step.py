"""One forward's view of a cache: who continues what, and where new keys go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.kernels.lightning.plan import FirstRows

if TYPE_CHECKING:
    from model.cache import DecodeCache


@dataclass(frozen=True)
class CacheStep:
    """Any number of new tokens for each of S slots.

    Args:
        past: [S] int64, tokens held before; is_fresh if all are 0.
        rows: [T] int64, row of each new token in the pages laid end to end.
        table: [S, P] int64, pages of each slot, the last repeated to P.
        index: [S] int64, the slots.
        held: past, on the host.
    """

    cache: DecodeCache
    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    held: tuple[int, ...]
    past: Tensor
    rows: Tensor
    table: Tensor
    index: Tensor
    is_fresh: bool

    def state(self, layer: int) -> Tensor:
        """[S, H, D, D] fp32, the lightning states before the new tokens."""
        return self.cache.states[self.cache.lightning[layer]].index_select(0, self.index)

    def put_state(self, layer: int, state: Tensor) -> None:
        self.cache.states[self.cache.lightning[layer]].index_copy_(0, self.index, state.detach())

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores the new tokens' keys and values, each [T, G, D]."""
        _write(self.cache.pages[self.cache.softmax[layer]], self.rows, k, v)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of every slot, each [S, P * page_tokens, G, D]."""
        pages = self.cache.pages[self.cache.softmax[layer]]
        keys, values = (store[self.table].flatten(1, 2) for store in pages)
        return keys, values

    def read_past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values from before the new tokens, packed by `held`, each [sum(held), G, D]."""
        pages = self.cache.pages[self.cache.softmax[layer]]
        size = pages.shape[2]
        keys, values = (
            torch.cat(
                [
                    store[self.table[i, : -(-held // size)]].flatten(0, 1)[:held]
                    for i, held in enumerate(self.held)
                    if held
                ]
            )
            for store in pages
        )
        return keys, values

    def end(self) -> None:
        """Counts the new tokens as held, once every layer has seen them."""
        for slot, length in zip(self.slots, self.lengths, strict=True):
            self.cache.lengths[slot] += length


@dataclass(frozen=True)
class DecodeStep:
    """One new token for each of S slots, all of it on the device, of shapes that can stay.

    Args:
        states: [L, M, H, D, D] fp32, lightning states of all slots, written in place.
        pages: [L', 2, N, Z, G, D], keys and values, written in place.
        lightning, softmax: place of a layer's number among the L or L'.
        table: [M, P] int32, pages of every slot.
        index: [S] int64, slot of each sequence; rows that only fill the batch share one slot.
        lengths: [S] int64, tokens of each with the new one.
    """

    states: Tensor
    pages: Tensor
    lightning: dict[int, int]
    softmax: dict[int, int]
    table: Tensor
    index: Tensor
    lengths: Tensor

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores the new tokens' keys and values, each [S, G, D]."""
        size, place = self.pages.shape[3], self.lengths - 1
        page = self.table[self.index, place // size]
        _write(self.pages[self.softmax[layer]], page.long() * size + place % size, k, v)


@dataclass(frozen=True)
class PieceStep(DecodeStep):
    """New tokens of one slot, one behind the other, and rows that only fill a fixed shape.

    Rows are as in `DecodeStep`: each token is written before any is read, and reads as many as its
    own `lengths` says, so it sees those before it and none behind.

    Args:
        rows: which of them are tokens.
    """

    rows: FirstRows


Step = CacheStep | DecodeStep


def _write(pages: Tensor, rows: Tensor, k: Tensor, v: Tensor) -> None:
    for store, new in zip(pages, (k, v), strict=True):
        store.flatten(0, 1).index_copy_(0, rows, new.detach().to(store.dtype))


@dataclass(frozen=True)
class Snapshot:
    """What one slot held, on the host, bit for bit.

    Args:
        length: tokens.
        states: [L, H, D, D] fp32.
        pages: [L', 2, P, Z, G, D].
    """

    length: int
    states: Tensor
    pages: Tensor

    @property
    def num_pages(self) -> int:
        return self.pages.shape[2]
