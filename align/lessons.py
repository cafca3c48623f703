"""Which pairs each step of a reward stage sees, and what became of every one of them.

Without a curriculum the loader's own order stands. With one, the draws of `reward.curriculum.order`
are packed in their order; where it refreshes, the run is cut into parts of whole steps, and each
part is drawn when its first step comes, from what the model says then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

from align.data.batch import Batch, Pair
from align.data.loader import PackedData
from reward.curriculum import CurriculumConfig, PairFacts, Seen, competence, difficulty, order


class Lessons:
    """The pairs of each step.

    Args:
        data: pairs as supplied, with sizes of steps, epochs and seed.
        facts: of each of its pairs, in their order.
        curriculum: "none" keeps the loader's order.

    Raises: ValueError if a curriculum refreshes and data.batch_items is 0: the number of steps has
        to be known before the first.
    """

    def __init__(
        self,
        data: PackedData,
        facts: Sequence[PairFacts],
        curriculum: CurriculumConfig | Literal["none"],
    ) -> None:
        self.data = data
        self.pairs = tuple(item for item in data.items if isinstance(item, Pair))
        self._facts = list(facts)
        self._curriculum = curriculum
        self._measure = CurriculumConfig() if curriculum == "none" else curriculum
        self._parts: list[PackedData] = []
        # Of each draw so far: the pair, and how hard it was held to be.
        self._drawn: list[int] = []
        self._difficulties: list[float] = []
        self._epochs = data.epochs
        if curriculum == "none":
            self._starts = [0, data.num_steps]
            self._add(data, range(len(self.pairs)))
        elif curriculum.refreshes:
            self._starts = self._cut(curriculum.refreshes)
        else:
            self._draw_all(curriculum)

    @property
    def num_steps(self) -> int:
        return self._starts[-1]

    def is_due(self, step: int) -> bool:
        """Whether the pairs of this step are not drawn yet, so that `draw` comes first."""
        return step >= self._starts[len(self._parts)]

    def draw(self, margins: Sequence[float]) -> float:
        """Draws the next part.

        Args:
            margins: of all pairs under the model as it is; () for the first part.

        Returns: the competence that they show, 0 to 1.
        """
        assert self._curriculum != "none"
        shown = 0.0
        if margins:
            seen = set(self._drawn)
            shown = competence([m for i, m in enumerate(margins) if i not in seen])
            if self._curriculum.model_weight:
                self._facts = [
                    replace(facts, model_margin=margin)
                    for facts, margin in zip(self._facts, margins, strict=True)
                ]
        first, stop = self._starts[len(self._parts)], self._starts[len(self._parts) + 1]
        number = (stop - first) * self.data.batch_items
        drawn = order(
            self._facts,
            self._curriculum,
            epochs=self._epochs,
            seed=self.data.seed,
            before=self._drawn,
            number=number,
            competence=shown,
        )
        self._add(self._packed(drawn), drawn)
        return shown

    def batches(self, step: int, rank: int, world: int) -> tuple[Batch, ...]:
        """Microbatches of one rank."""
        part, first = self._part(step)
        return self._parts[part].batches(step - first, rank, world)

    def record(
        self, margins: Mapping[tuple[int, str], float], later: Sequence[float]
    ) -> list[Seen]:
        """One line per draw, in the order of steps.

        Args:
            margins: lead of the pair of this place at this step, as trained.
            later: lead of every pair under the finished model.
        """
        lines: list[Seen] = []
        offset = 0
        for part, packed in enumerate(self._parts):
            for step in range(packed.num_steps):
                at = self._starts[part] + step
                for position in (i for row in packed.step_items(step) for i in row):
                    index = self._drawn[offset + position]
                    pair = self.pairs[index]
                    place = pair.chosen.place
                    lines.append(
                        Seen(
                            place=place,
                            signal=pair.signal,
                            difficulty=self._difficulties[offset + position],
                            step=at,
                            margin=margins[at, place],
                            later=later[index],
                        )
                    )
            offset += len(packed.items)
        return lines

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot work out by itself: the draws that followed a refresh."""
        if self._curriculum == "none" or not self._curriculum.refreshes:
            return {}
        return {"drawn": list(self._drawn), "difficulties": list(self._difficulties)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        drawn, difficulties = state.get("drawn", []), state.get("difficulties", [])
        if drawn:
            self._parts, self._drawn, self._difficulties = [], [], []
            sizes = [
                (stop - first) * self.data.batch_items for first, stop in pairwise(self._starts)
            ]
            start = 0
            for size in sizes:
                some = drawn[start : start + size]
                if some:
                    self._add(self._packed(some), some)
                start += size
            self._difficulties = list(difficulties)

    def _part(self, step: int) -> tuple[int, int]:
        part = max(p for p, first in enumerate(self._starts[:-1]) if first <= step)
        return part, self._starts[part]

    def _add(self, packed: PackedData, drawn: Sequence[int]) -> None:
        self._parts.append(packed)
        self._drawn.extend(drawn)
        self._difficulties.extend(difficulty(self._facts[i], self._measure) for i in drawn)

    def _packed(self, drawn: Sequence[int]) -> PackedData:
        items = [self.pairs[i] for i in drawn]
        return replace(self.data, items=items, shuffle=False, epochs=1, max_steps=0)

    def _cut(self, refreshes: int) -> list[int]:
        """First steps of the parts, and the end."""
        size, pairs = self.data.batch_items, len(self.pairs)
        if not size:
            raise ValueError(
                f"curriculum.refreshes = {refreshes} with batch_items = 0: the number of steps has "
                "to be known before the first; set batch_items"
            )
        steps = self.data.max_steps
        if steps:
            self._epochs = -(-steps * size // pairs)
        else:
            steps = -(-pairs * self._epochs // size)
        marks = {round(part * steps / (refreshes + 1)) for part in range(refreshes + 2)}
        return sorted(marks)

    def _draw_all(self, curriculum: CurriculumConfig) -> None:
        """With max_steps the pacing spans all epochs that the run begins, so they hold enough."""
        data = self.data
        per_epoch = replace(data, epochs=1, max_steps=0).num_steps
        epochs = -(-data.max_steps // per_epoch) if data.max_steps else data.epochs
        while True:
            drawn = order(self._facts, curriculum, epochs=epochs, seed=data.seed)
            packed = self._packed(drawn)
            if packed.num_steps >= data.max_steps:
                break
            epochs += 1
        if data.max_steps:
            packed = replace(packed, max_steps=data.max_steps)
        self._starts = [0, packed.num_steps]
        self._add(packed, drawn)
