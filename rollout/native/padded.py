"""A piece of one prompt padded to a bucket: its tensors stay where they are, as a batch's do.

The device needs a tenth of the time in which the host launches a short prompt's kernels; of few
shapes, each is a graph. The rows are those of a decode step: each token writes its key and value
to the pages and then reads as many as it may see; rows behind the tokens belong to a slot that
nobody reads. Only the lightning layers have to know that the tokens are one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model import DecodeCache, HybridForCausalLM, Packed
from model.packed import sent
from rollout.native.batch import chosen_experts
from rollout.native.scheduler import Piece

BUCKETS = (32, 64, 128, 256, 512)
# rows times keys that the last one sees: attention to pages reads every row's keys anew
MAX_PAIRS = 1 << 22
# buckets that take no longer, one after the other, than the host to launch one packed forward
MAX_PIECES = 4


def bucket_of(begin: int, end: int) -> int | None:
    """Rows for tokens begin..end of a prompt, or None where padding is no gain.

    Example:
        >>> bucket_of(0, 40), bucket_of(0, 513)
        (64, None)
    """
    fits = (rows for rows in BUCKETS if end - begin <= rows and rows * end <= MAX_PAIRS)
    return next(fits, None)


@dataclass(frozen=True)
class Last:
    """What a piece leaves.

    Args:
        logits: [V] fp32 after its last token.
        experts: [R, layers, K] int16, or None.
    """

    logits: Tensor
    experts: Tensor | None


class Padded:
    """R rows for the tokens of one piece at a time.

    Args:
        filler: slot of the rows behind them; it has a page.
        rows: R.
    """

    def __init__(
        self, model: HybridForCausalLM, cache: DecodeCache, *, filler: int, rows: int
    ) -> None:
        self.model, self.cache = model, cache
        self.filler, self.rows = filler, rows
        # what changes from piece to piece, sent at once
        self._numbers = torch.zeros(3 * rows + 1, dtype=torch.int64, device=cache.states.device)
        self.tokens, self.index, self.lengths = self._numbers[:-1].view(3, rows)
        self.count = self._numbers[-1:]
        self.clear()

    def fill(self, piece: Piece) -> None:
        """The tokens of a piece, whose root `begin_decode` made room for."""
        size = piece.end - piece.begin
        tokens = piece.group.tokens[piece.begin : piece.end]
        self._send(tokens, piece.group.root, torch.arange(piece.begin, piece.end) + 1, size)

    def clear(self) -> None:
        """One token in the filler's slot."""
        one = torch.ones(1, dtype=torch.int64)
        self._send(one - 1, self.filler, one, 1)

    def _send(self, tokens: Tensor, slot: int, lengths: Tensor, count: int) -> None:
        numbers = torch.empty(3 * self.rows + 1, dtype=torch.int64)
        rows = numbers[:-1].view(3, self.rows)
        for row, own, rest in zip(rows, (tokens, slot, lengths), (0, self.filler, 1), strict=True):
            row[:count], row[count:] = own, rest
        numbers[-1] = count
        self._numbers.copy_(sent(numbers, self._numbers.device))

    def step(self, with_experts: bool) -> Last:
        """Writes the cache and gives what comes after the last token; waits for nothing."""
        packed = Packed(self.tokens, self.lengths - 1, (1,) * self.rows)
        step = self.cache.decode_step(self.index, self.lengths, self.count)
        out = self.model.model.decode(packed, step)
        last = out.hidden.index_select(0, self.count - 1)
        experts = None
        if with_experts:
            experts = chosen_experts(out.router_logits, self.model.config.num_experts_per_tok)
        return Last(self.model.logits(last)[0], experts)
