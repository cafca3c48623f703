"""Which pair comes when: difficulty of a pair, pacing from easy to hard, and a record of it.

Difficulty is a weighted mean of what is known of a pair. Pairs that label one head come before
those that label a dimension, these before those that only say which answer is better overall;
within each, every label's pairs are spread evenly, easiest first. At progress t of the run the
easiest share c(t) of this ranking is open,

    linear      c = c0 + (1 - c0) u      root  c = sqrt(c0^2 + (1 - c0^2) u)     u = min(t / t1, 1)
    competence  c = max(t, c0 + (1 - c0) max(0, 2a - 1))

where a is the share of the pairs not seen yet that the model already ranks right, measured whenever
the run refreshes. Each draw takes one of the open pairs seen least often so far (Platanios et al.,
2019, arXiv 1903.09848, sample from the open share instead). As c(t) >= t, every pair is drawn
exactly once per epoch of draws: a curriculum and a random order train equally much on the same
pairs; only refreshing costs a forward pass over them.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward.hierarchy import sigmoid


class CurriculumConfig(BaseModel):
    """How training goes from easy pairs to hard ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pacing: Literal["linear", "root", "competence"] = "root"
    """How the open share grows: with progress, or with what the model can do already."""
    start_share: float = Field(default=0.2, gt=0, le=1)
    """Share of the pairs that is open at the first step."""
    full_at: float = Field(default=0.8, gt=0, le=1)
    """Share of the run after which every pair is open; `competence` does not use it."""
    leaves_first: bool = True
    """Whether labels of one head come first, then those of a dimension, then `overall`."""
    row_weight: float = Field(default=1.0, ge=0)
    """Share of the row's own difficulty (annotator agreement, the task's dial)."""
    margin_weight: float = Field(default=0.5, ge=0)
    """Share of the label's margin, where it is known: a wide margin is easy."""
    length_weight: float = Field(default=0.25, ge=0)
    """Share of the length gap: answers of one length are hard to tell apart."""
    source_weight: float = Field(default=0.0, ge=0)
    """Share of the source's difficulty, for sources that `sources` names."""
    sources: dict[str, float] = Field(default_factory=dict)
    """Difficulty of sources by name, 0 easy to 1 hard."""
    model_weight: float = Field(default=0.0, ge=0)
    """Share of the model's own margin on the pair: the starting policy's, later the reward model's.
    0 does not ask it."""
    refreshes: int = Field(default=0, ge=0)
    """How often the model is asked again, evenly over the run; needs the stage's batch_items."""

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if not self.row_weight + self.length_weight:
            raise ValueError(
                "row_weight and length_weight are 0, so a pair without margin has no difficulty; "
                "give one of them"
            )
        if self.pacing == "competence" and not self.refreshes:
            raise ValueError(
                "pacing = competence with refreshes = 0, expected 1 or more: nothing would measure "
                "what the model can do"
            )
        if self.refreshes and not self.model_weight and self.pacing != "competence":
            raise ValueError(
                f"refreshes = {self.refreshes}, but nothing uses what they measure; give "
                "model_weight or set pacing: competence"
            )
        if bool(self.sources) != bool(self.source_weight):
            raise ValueError(
                f"source_weight = {self.source_weight:g} with {len(self.sources)} sources; "
                "give both or none"
            )
        wrong = {name: value for name, value in self.sources.items() if not 0 <= value <= 1}
        if wrong:
            raise ValueError(f"sources = {wrong}, expected difficulties from 0 to 1")
        return self


@dataclass(frozen=True)
class PairFacts:
    """What is known of one pair when it is ranked.

    Args:
        place: file and line, or task and index.
        signal: what its label speaks about.
        row_difficulty: in [0, 1].
        margin: in the label's own scale; 0 if unknown.
        chosen_tokens, rejected_tokens: length of each answer, >= 1.
        model_margin: chosen minus rejected under the model, in logits or nats a token; None if not
            asked.
        phase: 0 if the label is one head's, 1 a dimension's, 2 of the whole score.
        source: name of the source.
    """

    place: str
    signal: str
    row_difficulty: float
    margin: float
    chosen_tokens: int
    rejected_tokens: int
    model_margin: float | None = None
    phase: int = 0
    source: str = ""


@dataclass(frozen=True)
class Seen:
    """One line of the record: a pair, how hard it was held to be, and the step that saw it.

    Args:
        step: 0-based.
        margin: chosen minus rejected under the label's value in that step's forward pass, logits.
        later: the same under the finished model.
    """

    place: str
    signal: str
    difficulty: float
    step: int
    margin: float
    later: float


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
    if facts.source in config.sources:
        parts.append((config.source_weight, config.sources[facts.source]))
    if facts.model_margin is not None:
        parts.append((config.model_weight, sigmoid(-facts.model_margin)))
    total = sum(weight for weight, _ in parts)
    return sum(weight * value for weight, value in parts) / total


def open_share(config: CurriculumConfig, progress: float, competence: float = 0.0) -> float:
    """Share of the ranking that is open at a progress in [0, 1].

    Args:
        competence: 0 to 1, of the last refresh; used by that pacing alone.

    Example:
        >>> config = CurriculumConfig(pacing="linear", start_share=0.2, full_at=0.5)
        >>> [round(open_share(config, progress), 3) for progress in (0.0, 0.25, 0.9)]
        [0.2, 0.6, 1.0]
    """
    start, done = config.start_share, min(progress / config.full_at, 1.0)
    if config.pacing == "competence":
        return max(progress, start + (1 - start) * competence)
    if config.pacing == "linear":
        return start + (1 - start) * done
    return math.sqrt(start**2 + (1 - start**2) * done)


def competence(margins: Sequence[float]) -> float:
    """What a model can do of pairs it has not seen: 0 at chance, 1 with all of them ranked right.

    Args:
        margins: chosen minus rejected of each; a tie counts half.

    Example:
        >>> competence([0.3, 0.1, 2.0, -1.0]), competence([-1.0])
        (0.5, 0.0)
    """
    if not margins:
        return 1.0
    right = sum(0.5 if margin == 0 else float(margin > 0) for margin in margins)
    return max(0.0, 2 * right / len(margins) - 1)


def rank(facts: Sequence[PairFacts], config: CurriculumConfig) -> list[int]:
    """Indices from first to last: phase by phase, each label's easiest first.

    A label's pairs are placed by their quantile among themselves, so that an easy signal does not
    come as a whole before a hard one.
    """
    by_label: dict[str, list[int]] = {}
    for index, pair in enumerate(facts):
        by_label.setdefault(pair.signal, []).append(index)
    keys: dict[int, tuple[int, float]] = {}
    for members in by_label.values():
        ordered = sorted(members, key=lambda index: difficulty(facts[index], config))
        for place, index in enumerate(ordered):
            phase = facts[index].phase if config.leaves_first else 0
            keys[index] = (phase, (place + 0.5) / len(ordered))
    return sorted(keys, key=lambda index: (*keys[index], index))


def order(
    facts: Sequence[PairFacts],
    config: CurriculumConfig,
    *,
    epochs: int,
    seed: int,
    before: Sequence[int] = (),
    number: int = 0,
    competence: float = 0.0,
) -> list[int]:
    """Indices of the run's next draws: in all, every pair `epochs` times, easy ones earlier.

    Args:
        facts: as known now; a refresh gives the same pairs with other margins.
        before: the draws made so far.
        number: of draws to make; 0 makes all that are left.
        competence: as in `open_share`.

    Raises: ValueError if there is no pair or epochs < 1.

    Example:
        >>> facts = [PairFacts(f"a:{n}", "style", n / 9, 0.0, 5, 5) for n in range(10)]
        >>> drawn = order(facts, CurriculumConfig(start_share=0.1, full_at=1.0), epochs=1, seed=0)
        >>> sorted(drawn) == list(range(10)), sum(drawn[:5]) < sum(drawn[5:])
        (True, True)
    """
    if not facts or epochs < 1:
        raise ValueError(f"{len(facts)} pairs in {epochs} epochs, expected 1 or more of both")
    ranking, draws, counts = rank(facts, config), len(facts) * epochs, Counter(before)
    chance = random.Random(f"curriculum/{seed}/{len(before)}")
    # Open pairs by how often they were drawn; a draw takes one of the least drawn.
    waiting: list[list[int]] = [[] for _ in range(epochs + 1)]
    opened, drawn = 0, []
    stop = min(len(before) + number, draws) if number else draws
    for draw in range(len(before), stop):
        share = open_share(config, draw / draws, competence)
        # At least so many that an open pair is left for this draw, whatever rounding did.
        wanted = min(max(math.ceil(share * len(facts)), draw // epochs + 1), len(facts))
        for index in ranking[opened:wanted]:
            waiting[counts[index]].append(index)
        opened = max(opened, wanted)
        group = next(group for group in waiting if group)
        pick = chance.randrange(len(group))
        group[pick], group[-1] = group[-1], group[pick]
        index = group.pop()
        counts[index] += 1
        waiting[counts[index]].append(index)
        drawn.append(index)
    return drawn
