"""Short lists given back: sorted, as they are, or from the end."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from align.data.generate.lexicon import ANIMALS, COLOURS, OBJECTS
from align.data.generate.problem import Problem, scale

WORDS = (*OBJECTS, *COLOURS, *ANIMALS)


def sort(rng: Random, difficulty: float, context_tokens: int) -> Problem:
    """Numbers in order: three of one digit at 0, eight of two digits at 1."""
    most = 9 if difficulty < 0.5 else 99
    numbers = rng.sample(range(most + 1), scale(difficulty, 3, 8))
    is_falling = rng.random() < 0.5
    way = "from high to low" if is_falling else "from low to high"
    start = rng.choice(("Sort", "Order", "Put in order"))
    return _listed(
        rng,
        f"{start} {way}: {' '.join(map(str, numbers))}",
        [str(number) for number in sorted(numbers, reverse=is_falling)],
        [str(number) for number in range(most + 1)],
    )


def copy(rng: Random, difficulty: float, context_tokens: int) -> Problem:
    """Words as they are: two at 0, ten at 1."""
    words = rng.sample(WORDS, scale(difficulty, 2, 10))
    start = rng.choice(("Copy", "Repeat", "Say again"))
    return _listed(rng, f"{start}: {' '.join(words)}", words, WORDS)


def reverse(rng: Random, difficulty: float, context_tokens: int) -> Problem:
    """Words from the last to the first: two at 0, eight at 1."""
    words = rng.sample(WORDS, scale(difficulty, 2, 8))
    start = rng.choice(("Reverse", "Turn around", "Say from the end"))
    return _listed(rng, f"{start}: {' '.join(words)}", words[::-1], WORDS)


def _listed(rng: Random, question: str, answer: list[str], pool: Sequence[str]) -> Problem:
    """A problem whose near miss has two neighbours changed, and whose other answer is drawn."""
    swapped = list(answer)
    at = rng.randrange(len(answer) - 1)
    swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
    response = " ".join(answer)
    while (other := rng.sample(pool, len(answer))) == answer:
        pass
    return Problem(
        question=question,
        response=response,
        answer=response,
        verifier="exact",
        wrong={"near_miss": " ".join(swapped), "other_answer": " ".join(other)},
    )
