"""Which pair comes when: difficulty of a pair, pacing from easy to hard, and a record of it.

Difficulty is a weighted mean of what is known of a pair. Pairs that label one signal come before
pairs that only say which answer is better overall; within each, every signal's pairs are spread
evenly, easiest first. At progress t of the run the easiest share c(t) of this ranking is open,

    linear  c = c0 + (1 - c0) u        root  c = sqrt(c0^2 + (1 - c0^2) u)        u = min(t / t1, 1)

and each draw takes one of the open pairs seen least often so far (Platanios et al., 2019,
arXiv 1903.09848, sample from the open share instead). As c(t) >= t, every pair is drawn exactly
once per epoch of draws: a curriculum and a random order cost the same and see the same pairs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward.hierarchy import sigmoid

OVERALL = "overall"


class CurriculumConfig(BaseModel):
    """How training goes from easy pairs to hard ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pacing: Literal["linear", "root"] = "root"
    """How the open share grows with progress."""
    start_share: float = Field(default=0.2, gt=0, le=1)
    """Share of the pairs that is open at the first step."""
    full_at: float = Field(default=0.8, gt=0, le=1)
    """Share of the run after which every pair is open."""
    leaves_first: bool = True
    """Whether pairs that label one signal come before pairs labelled `overall`."""
    row_weight: float = Field(default=1.0, ge=0)
    """Share of the row's own difficulty (annotator agreement, the task's dial)."""
    margin_weight: float = Field(default=0.5, ge=0)
    """Share of the label's margin, where it is known: a wide margin is easy."""
    length_weight: float = Field(default=0.25, ge=0)
    """Share of the length gap: answers of one length are hard to tell apart."""
    model_weight: float = Field(default=0.0, ge=0)
    """Share of the starting model's own margin on the pair; 0 does not ask it."""

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if not self.row_weight + self.length_weight:
            raise ValueError(
                "row_weight and length_weight are 0, so a pair without margin has no difficulty; "
                "give one of them"
            )
        return self


@dataclass(frozen=True)
class PairFacts:
    """What is known of one pair before training.

    Args:
        place: file and line, or task and index.
        signal: the signal its label speaks about.
        row_difficulty: in [0, 1].
        margin: in the label's own scale; 0 if unknown.
        chosen_tokens, rejected_tokens: length of each answer, >= 1.
        model_margin: chosen minus rejected under the starting model, in logits; None if not asked.
    """

    place: str
    signal: str
    row_difficulty: float
    margin: float
    chosen_tokens: int
    rejected_tokens: int
    model_margin: float | None = None


@dataclass(frozen=True)
class Seen:
    """One line of the record: a pair, how hard it was held to be, and the step that saw it."""

    place: str
    signal: str
    difficulty: float
    step: int


def difficulty(facts: PairFacts, config: CurriculumConfig) -> float:
    """0 easy to 1 hard.

    Example:
        >>> facts = PairFacts("a:1", "style", 0.0, 0.0, chosen_tokens=8, rejected_tokens=8)
        >>> difficulty(facts, CurriculumConfig(row_weight=3.0, length_weight=1.0))
        0.25
    """
    longer = max(facts.chosen_tokens, facts.rejected_tokens)
    gap = abs(facts.chosen_tokens - facts.rejected_tokens) / longer
    parts = [(config.row_weight, facts.row_difficulty), (config.length_weight, 1 - gap)]
    if facts.margin:
        parts.append((config.margin_weight, math.exp(-abs(facts.margin))))
    if facts.model_margin is not None:
        parts.append((config.model_weight, sigmoid(-facts.model_margin)))
    total = sum(weight for weight, _ in parts)
    return sum(weight * value for weight, value in parts) / total


def open_share(config: CurriculumConfig, progress: float) -> float:
    """Share of the ranking that is open at a progress in [0, 1].

    Example:
        >>> config = CurriculumConfig(pacing="linear", start_share=0.2, full_at=0.5)
        >>> [round(open_share(config, progress), 3) for progress in (0.0, 0.25, 0.9)]
        [0.2, 0.6, 1.0]
    """
    start, done = config.start_share, min(progress / config.full_at, 1.0)
    if config.pacing == "linear":
        return start + (1 - start) * done
    return math.sqrt(start**2 + (1 - start**2) * done)


def rank(facts: Sequence[PairFacts], config: CurriculumConfig) -> list[int]:
    """Indices from first to last: leaf signals before overall, each signal's easiest first.

    A signal's pairs are placed by their quantile within the signal, so that an easy signal does not
    come as a whole before a hard one.
    """
    by_signal: dict[str, list[int]] = {}
    for index, pair in enumerate(facts):
        by_signal.setdefault(pair.signal, []).append(index)
    keys: dict[int, tuple[int, float]] = {}
    for signal, members in by_signal.items():
        stage = int(config.leaves_first and signal == OVERALL)
        ordered = sorted(members, key=lambda index: difficulty(facts[index], config))
        for place, index in enumerate(ordered):
            keys[index] = (stage, (place + 0.5) / len(ordered))
    return sorted(keys, key=lambda index: (*keys[index], index))


def order(
    facts: Sequence[PairFacts], config: CurriculumConfig, *, epochs: int, seed: int
) -> list[int]:
    """Indices of all draws of the run: every pair exactly `epochs` times, easy ones earlier.

    Raises: ValueError if there is no pair or epochs < 1.

    Example:
        >>> facts = [PairFacts(f"a:{n}", "style", n / 9, 0.0, 5, 5) for n in range(10)]
        >>> drawn = order(facts, CurriculumConfig(start_share=0.1, full_at=1.0), epochs=1, seed=0)
        >>> sorted(drawn) == list(range(10)), sum(drawn[:5]) < sum(drawn[5:])
        (True, True)
    """
    if not facts or epochs < 1:
        raise ValueError(f"{len(facts)} pairs in {epochs} epochs, expected 1 or more of both")
    ranking, draws = rank(facts, config), len(facts) * epochs
    chance = random.Random(f"curriculum/{seed}")
    # Open pairs by how often they were drawn; a draw takes one of the least drawn.
    waiting: list[list[int]] = [[] for _ in range(epochs + 1)]
    opened, lowest, drawn = 0, 0, []
    for draw in range(draws):
        share = open_share(config, draw / draws)
        # At least so many that an open pair is left for this draw, whatever rounding did.
        wanted = min(max(math.ceil(share * len(facts)), draw // epochs + 1), len(facts))
        if wanted > opened:
            waiting[0].extend(ranking[opened:wanted])
            opened, lowest = wanted, 0
        while not waiting[lowest]:
            lowest += 1
        group = waiting[lowest]
        pick = chance.randrange(len(group))
        group[pick], group[-1] = group[-1], group[pick]
        index = group.pop()
        waiting[lowest + 1].append(index)
        drawn.append(index)
    return drawn


def record(
    facts: Sequence[PairFacts],
    config: CurriculumConfig,
    steps: Iterable[Iterable[int]],
) -> list[Seen]:
    """What was seen when: one line per draw.

    Args:
        steps: indices into facts of each optimizer step, first step first.
    """
    return [
        Seen(facts[i].place, facts[i].signal, difficulty(facts[i], config), step)
        for step, indices in enumerate(steps)
        for i in indices
    ]
