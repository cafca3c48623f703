"""How a packed row lies on the processes: a seam that `model/parallel/apply.py` replaces.

What a model gives for each token is cut and joined here, and nowhere else; losses, which are made
of a row's log-probabilities, see whole rows however many processes computed them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.packed import Packed, sent


class Row:
    """The whole row on this process, which works alone on it.

    Example:
        >>> packed = Packed.from_sequences([[5, 6, 7], [8]])
        >>> row = Row()
        >>> row.own(packed) is packed
        True
        >>> row.take(torch.arange(8.0).view(4, 2), [2, 3], packed).tolist()
        [[4.0, 5.0], [6.0, 7.0]]
    """

    def own(self, packed: Packed) -> Packed:
        """What this process computes of a row."""
        return packed

    def part(self, x: Tensor, own: Packed) -> Tensor:
        """[T, ...] of the row -> [T', ...] of this process's tokens."""
        return x

    def whole(self, x: Tensor, own: Packed) -> Tensor:
        """[T', ...] of this process's tokens -> [T, ...] of the row, with gradients."""
        return x

    def take(self, x: Tensor, places: Sequence[int], own: Packed) -> Tensor:
        """[T', C] of this process's tokens -> [N, C] at N places of the row, with gradients."""
        return x.index_select(0, sent(torch.tensor(places, dtype=torch.int64), x.device))

    def mean(self, x: Tensor, tokens: int) -> Tensor:
        """A mean over this process's tokens -> the mean over all that are counted, with gradients.

        Args:
            tokens: how many x is the mean of.
        """
        return x
