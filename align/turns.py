"""Which prompts a rollout has, in which order, and which process samples them.

The order is a function of the seed and the step alone. Processes take turns within each step, and
what they made is put back in the prompts' own order, in which nothing shows who sampled what: that
is what a checkpoint holds, so that any number of processes can go on from it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import TypeVar

from align.prompts import Prompt, seed_of

T = TypeVar("T")


@dataclass(frozen=True)
class Turns:
    """The prompts of every step.

    Args:
        prompts: one epoch of them.
        num_prompts: asked in all.
        per_step: prompts of a step, over all processes; the last step may have fewer.
        steps_a_rollout: steps that one rollout is for.
        seed: of the stage; every prompt has a seed of its own by its number.
        shuffle: each epoch in an order of its own.
        process: which process this is, and how many there are.

    Example:
        >>> from align.data.rows import Origin, PromptRow
        >>> row = PromptRow((), Origin("a.jsonl", 1))
        >>> each = [Prompt(row, (token,)) for token in (7, 8, 9)]
        >>> turns = Turns(each, 5, 2, 2, seed=0, shuffle=False, process=(0, 2))
        >>> [[prompt.tokens for prompt, _ in turns.of(step)] for step in range(turns.num_steps)]
        [[(7,), (8,)], [(9,), (7,)], [(8,)]]
        >>> [prompt.tokens for prompt, _ in turns.own(0)]
        [(7,), (9,)]
        >>> turns.in_order(0, [["seven", "nine"], ["eight", "seven again"]])
        [['seven', 'eight'], ['nine', 'seven again']]
    """

    prompts: Sequence[Prompt]
    num_prompts: int
    per_step: int
    steps_a_rollout: int
    _: KW_ONLY
    seed: int
    shuffle: bool
    process: tuple[int, int]

    @property
    def num_steps(self) -> int:
        """Of the stage."""
        return -(-self.num_prompts // self.per_step)

    def of(self, step: int) -> list[tuple[Prompt, int]]:
        """All processes' prompts of a step, each with its seed."""
        size, number = self.per_step, len(self.prompts)
        places = range(step * size, min((step + 1) * size, self.num_prompts))
        orders = {}
        for epoch in {place // number for place in places}:
            orders[epoch] = list(range(number))
            if self.shuffle:
                random.Random(f"{self.seed}/{epoch}").shuffle(orders[epoch])
        return [
            (self.prompts[orders[place // number][place % number]], seed_of(self.seed, place))
            for place in places
        ]

    def own(self, index: int) -> list[tuple[Prompt, int]]:
        """This process's prompts of the rollout that begins with step `index`."""
        every = [prompt for step in self._steps(index) for prompt in self.of(step)]
        return self.own_of(index, every)

    def own_of(self, index: int, every: Sequence[T]) -> list[T]:
        """This process's part of something for each prompt of a rollout, in the prompts' order."""
        rank, world = self.process
        left = iter(every)
        by_step = [list(islice(left, len(self.of(step)))) for step in self._steps(index)]
        return [one for of_step in by_step for one in of_step[rank::world]]

    def in_order(self, index: int, shares: Sequence[Sequence[T]]) -> list[list[T]]:
        """What each process has of its own prompts, by step in the prompts' own order."""
        left = [iter(share) for share in shares]
        return [
            [next(left[n % len(left)]) for n in range(len(self.of(step)))]
            for step in self._steps(index)
        ]

    def _steps(self, index: int) -> range:
        return range(index, min(index + self.steps_a_rollout, self.num_steps))
