"""The one input inside: documents laid end to end, with the borders known.

Every layer sees tokens as one row of length T. `cu_seqlens` says where each of the S sequences
starts; nothing may cross a border: not attention, not a recurrent state, not a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """S sequences of tokens in one row.

    Args:
        tokens: [T] int64, token ids.
        positions: [T] int64, position of each token in its own sequence, >= 0. A sequence that
            continues a cache starts at its past length.
        lengths: new tokens of each sequence, >= 1, sum T. Kept on the host, so that no layer
            waits for the device to learn a shape.

    Raises:
        ValueError: if tokens and positions differ in shape or the lengths do not sum to T.

    Example:
        >>> packed = Packed.from_sequences([[5, 6, 7], [8]])
        >>> packed.positions.tolist(), packed.cu_seqlens.tolist()
        ([0, 1, 2, 0], [0, 3, 4])
    """

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        total = self.tokens.numel()
        if self.tokens.ndim != 1 or self.positions.shape != self.tokens.shape:
            raise ValueError(
                f"Packed.tokens {tuple(self.tokens.shape)} and Packed.positions "
                f"{tuple(self.positions.shape)} must both be [T]; flatten them first"
            )
        if sum(self.lengths) != total or min(self.lengths, default=1) < 1:
            raise ValueError(
                f"Packed.lengths = {self.lengths} must be >= 1 each and sum to T = {total}; "
                "drop empty sequences"
            )

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
    ) -> Packed:
        """Lays token lists end to end, each starting at position 0."""
        lengths = tuple(len(sequence) for sequence in sequences)
        tokens = [token for sequence in sequences for token in sequence]
        positions = [position for length in lengths for position in range(length)]
        return cls(
            torch.tensor(tokens, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            lengths,
        )

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[S + 1] int32 on the tokens' device: start of each sequence, and T at the end."""
        starts = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return sent(starts, self.tokens.device)

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    def to(self, device: torch.device | str) -> Packed:
        return Packed(sent(self.tokens, device), sent(self.positions, device), self.lengths)


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """x on `device`; a host that sends to CUDA waits neither for the copy nor for what runs."""
    if x.device.type != "cpu" or torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
