"""From a rendered row to what a model sees: `Example` (one sequence), `Pair`, `Batch` (packed)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.packed import Packed, sent
from reward.types import Item


@dataclass(frozen=True)
class Example:
    """One tokenised sequence with what training needs to know of each token.

    Args:
        tokens: token ids, at least two.
        weights: loss weight of *predicting* each token, aligned with tokens; weights[0] is 0,
            because nothing comes before the first token.
        place: file and line, or task and index, for messages.
        behaviour_logprobs: what the policy that sampled each token gave it; () outside RL.
        advantages: advantage of each token; () outside RL.
        experts: [T, layers, K] int16, what an engine recorded, -1 where it did not; None without.

    Raises:
        ValueError: if the lengths differ, fewer than two tokens, or no token is trained.

    Example:
        >>> Example(tokens=(1, 2, 3), weights=(0.0, 0.0, 1.0), place="a.jsonl:1").num_trained
        1
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    place: str
    behaviour_logprobs: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()
    experts: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        size = len(self.tokens)
        if size < 2 or len(self.weights) != size or self.weights[0] != 0:
            raise ValueError(
                f"{self.place}: {size} tokens, {len(self.weights)} weights, first weight "
                f"{self.weights[:1]}; expected two tokens or more, as many weights, the first 0"
            )
        for name, extra in (
            ("behaviour_logprobs", self.behaviour_logprobs),
            ("advantages", self.advantages),
        ):
            if extra and len(extra) != size:
                raise ValueError(f"{self.place}: {len(extra)} {name} for {size} tokens")
        if self.experts is not None and len(self.experts) != size:
            raise ValueError(f"{self.place}: experts of {len(self.experts)} for {size} tokens")
        if not any(self.weights):
            raise ValueError(
                f"{self.place}: no token is trained (all weights 0); "
                "drop the row or check its assistant turns"
            )

    @property
    def num_trained(self) -> int:
        return sum(weight != 0 for weight in self.weights)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt as examples; the labels as in PreferenceRow, and their source.

    Args:
        rules: both answers as a rule judges them, where the row names one.
    """

    chosen: Example
    rejected: Example
    signal: str = "overall"
    difficulty: float = 0.5
    margin: float = 0.0
    source: str = ""
    rules: tuple[Item, Item] | None = None


@dataclass(frozen=True)
class Batch:
    """One microbatch of one rank: packed sequences with targets shifted into place.

    Args:
        packed: S sequences, T tokens.
        targets: [T] int64, the next token of the same sequence; 0 at a sequence's last position.
        weights: [T] fp32, loss weight of predicting targets[t]; 0 at each last position.
        behaviour_logprobs, advantages: [T] fp64 aligned with targets; None outside RL.
        pairs: for preferences: sequences 2i and 2i + 1 are chosen and rejected of pairs[i].
        places: [S] where each sequence came from.
        experts: [T, layers, K] int16 aligned with packed.tokens; None where none are recorded.
    """

    packed: Packed
    targets: Tensor
    weights: Tensor
    places: tuple[str, ...]
    behaviour_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    pairs: tuple[Pair, ...] = ()
    experts: Tensor | None = None

    @classmethod
    def from_examples(cls, examples: Sequence[Example]) -> Batch:
        """Lays examples end to end in the given order.

        Example:
            >>> batch = Batch.from_examples([Example((1, 2, 3), (0.0, 0.0, 1.0), "a:1")])
            >>> batch.targets.tolist(), batch.weights.tolist()
            ([2, 3, 0], [0.0, 1.0, 0.0])
        """
        in_rl = bool(examples) and bool(examples[0].advantages)
        return cls(
            packed=Packed.from_sequences([example.tokens for example in examples]),
            targets=torch.tensor([t for e in examples for t in (*e.tokens[1:], 0)]),
            weights=torch.tensor([w for e in examples for w in (*e.weights[1:], 0.0)]),
            places=tuple(example.place for example in examples),
            behaviour_logprobs=_aligned(e.behaviour_logprobs for e in examples) if in_rl else None,
            advantages=_aligned(e.advantages for e in examples) if in_rl else None,
            experts=_joined([example.experts for example in examples]),
        )

    @classmethod
    def from_pairs(cls, pairs: Sequence[Pair]) -> Batch:
        """Chosen and rejected of each pair side by side, so that a pair is never split."""
        batch = cls.from_examples([e for pair in pairs for e in (pair.chosen, pair.rejected)])
        return cls(batch.packed, batch.targets, batch.weights, batch.places, pairs=tuple(pairs))

    def to(self, device: torch.device | str) -> Batch:
        def move(extra: Tensor | None) -> Tensor | None:
            return None if extra is None else sent(extra, device)

        return Batch(
            self.packed.to(device),
            sent(self.targets, device),
            sent(self.weights, device),
            self.places,
            move(self.behaviour_logprobs),
            move(self.advantages),
            self.pairs,
            move(self.experts),
        )


def _aligned(extras: Iterable[Sequence[float]]) -> Tensor:
    """Per-token numbers end to end, each at the token before; every digit of them is kept."""
    return torch.tensor([x for e in extras for x in (*e[1:], 0.0)], dtype=torch.float64)


def _joined(recorded: Sequence[Tensor | None]) -> Tensor | None:
    """Experts of all examples end to end; None unless every one has them."""
    found = [experts for experts in recorded if experts is not None]
    return torch.cat(found) if found and len(found) == len(recorded) else None
