"""Examples to the microbatches of each optimizer step, as a pure function of seed and index.

Each epoch has its own order (a permutation by the seed, or the given order), is packed in that
order and cut into steps. Nothing is remembered between steps, so a resumed run needs only the
index of its next step. Ranks take whole microbatches by turns, so that the number of ranks changes
neither what is computed together nor any number that comes of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from align.data.batch import Batch, Example, Pair
from align.data.packing import pack


def item_tokens(item: Example | Pair) -> int:
    """Tokens that an item takes in a packed sequence; of both answers for a pair."""
    if isinstance(item, Pair):
        return len(item.chosen.tokens) + len(item.rejected.tokens)
    return len(item.tokens)


@dataclass(frozen=True)
class PackedData:
    """Examples or pairs, packed and cut into optimizer steps.

    Args:
        items: all of one kind.
        sequence_tokens: capacity of one packed sequence, in tokens.
        batch_sequences: packed sequences per optimizer step, over all ranks.
        batch_items: if > 0, every step takes this many examples (or pairs) instead, packed within
            the step; batch_sequences is then not used.
        micro_sequences: packed sequences per microbatch, the piece that a step is dealt out in.
        epochs: how often every item is seen.
        max_steps: if > 0, exactly this many steps, going through as many epochs as they need;
            epochs is then not used.
        seed: of the orders of the epochs.
        shuffle: False keeps the given order in every epoch.

    Raises:
        ValueError: if there is no item, an item is longer than sequence_tokens, or a number is out
            of its range.

    Example:
        >>> two = Example((1, 2), (0.0, 1.0), "a:1"), Example((3, 4), (0.0, 1.0), "a:2")
        >>> data = PackedData(two, sequence_tokens=4, batch_sequences=1, shuffle=False)
        >>> data.num_steps, data.batches(0)[0].packed.tokens.tolist()
        (1, [1, 2, 3, 4])
    """

    items: Sequence[Example] | Sequence[Pair]
    sequence_tokens: int
    batch_sequences: int = 1
    batch_items: int = 0
    micro_sequences: int = 1
    epochs: int = 1
    max_steps: int = 0
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError(
                "no rows are left to train on; check the data's split, limit and skips"
            )
        for name, value, least in (
            ("sequence_tokens", self.sequence_tokens, 2),
            ("batch_sequences", self.batch_sequences, 1),
            ("batch_items", self.batch_items, 0),
            ("micro_sequences", self.micro_sequences, 1),
            ("epochs", self.epochs, 1),
            ("max_steps", self.max_steps, 0),
        ):
            if value < least:
                raise ValueError(f"{name} = {value}, expected >= {least}")
        items: Sequence[Example | Pair] = self.items
        for item, length in zip(items, self.lengths, strict=True):
            if length > self.sequence_tokens:
                raise ValueError(
                    f"{place_of(item)}: {length} tokens, longer than sequence_tokens = "
                    f"{self.sequence_tokens}; raise it or set too_long: skip on its source"
                )

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each item."""
        return tuple(item_tokens(item) for item in self.items)

    @cached_property
    def num_steps(self) -> int:
        return len(self._steps)

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch."""
        return sum(self.lengths)

    def step_items(self, step: int) -> tuple[tuple[int, ...], ...]:
        """Indices into items of each packed sequence of optimizer step `step`, all ranks.

        Raises:
            IndexError: if there is no such step.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step}, expected 0 to {self.num_steps - 1}")
        return self._steps[step]

    def batches(self, step: int, rank: int = 0, world: int = 1) -> tuple[Batch, ...]:
        """Microbatches of one rank in optimizer step `step`; () if the step is too small for it.

        Raises:
            IndexError: if there is no such step.
        """
        sequences, size = self.step_items(step), self.micro_sequences
        mine = range(rank * size, len(sequences), world * size)
        return tuple(
            self._batch([i for sequence in sequences[start : start + size] for i in sequence])
            for start in mine
        )

    @cached_property
    def _steps(self) -> list[tuple[tuple[int, ...], ...]]:
        steps: list[tuple[tuple[int, ...], ...]] = []
        epoch = 0
        while len(steps) < self.max_steps if self.max_steps else epoch < self.epochs:
            steps.extend(self._epoch(epoch))
            epoch += 1
        return list(islice(steps, self.max_steps or None))

    def _epoch(self, epoch: int) -> list[tuple[tuple[int, ...], ...]]:
        order = list(range(len(self.items)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        if self.batch_items:
            chunks = [
                order[start : start + self.batch_items]
                for start in range(0, len(order), self.batch_items)
            ]
            return [tuple(self._pack(chunk)) for chunk in chunks]
        sequences = self._pack(order)
        return [
            tuple(sequences[start : start + self.batch_sequences])
            for start in range(0, len(sequences), self.batch_sequences)
        ]

    def _pack(self, order: Sequence[int]) -> list[tuple[int, ...]]:
        runs = pack([self.lengths[index] for index in order], self.sequence_tokens)
        return [tuple(order[run.start : run.stop]) for run in runs]

    def _batch(self, indices: Sequence[int]) -> Batch:
        chosen = [self.items[index] for index in indices]
        pairs = [item for item in chosen if isinstance(item, Pair)]
        if pairs:
            return Batch.from_pairs(pairs)
        return Batch.from_examples([item for item in chosen if isinstance(item, Example)])


def place_of(item: Example | Pair) -> str:
    """File and line of an item, for messages."""
    return item.chosen.place if isinstance(item, Pair) else item.place
