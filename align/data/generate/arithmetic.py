"""Word problems: something is had, then given, lost or multiplied; how much is left?"""

from __future__ import annotations

from random import Random

from align.data.generate.lexicon import NAMES, OBJECTS, is_girl
from align.data.generate.problem import Problem, scale


def arithmetic(rng: Random, difficulty: float, context_tokens: int) -> Problem:
    """Steps and digits grow together: one step of one digit at 0, three of three digits at 1."""
    digits = scale(difficulty, 1, 3)
    steps = scale(difficulty, 1, 3)
    name, friend = rng.sample(NAMES, 2)
    items = rng.choice(OBJECTS) + "s"
    she = "she" if is_girl(name) else "he"
    most = 10**digits - 1
    total = rng.randint(most // 10 + 1, most)
    story = [f"{name} has {total} {items}."]
    for _ in range(steps):
        kind = rng.choice(("gets", "loses", "doubles") if difficulty >= 0.5 else ("gets", "loses"))
        if kind == "gets" or total == 0:
            amount = rng.randint(1, most)
            total += amount
            story.append(f"{friend} gives {'her' if is_girl(name) else 'him'} {amount} more.")
        elif kind == "loses":
            amount = rng.randint(1, min(total, most))
            total -= amount
            story.append(f"{she.capitalize()} loses {amount}.")
        else:
            factor = rng.randint(2, 3)
            total *= factor
            story.append(f"Then {she} has {factor} times as many.")
    answer = str(total)
    return Problem(
        question=f"{' '.join(story)} How many {items} does {name} have now?",
        response=answer,
        answer=answer,
        verifier="math",
        wrong={
            "near_miss": str(_near(rng, total)),
            "other_answer": str(_far(rng, total, most)),
        },
    )


def _near(rng: Random, total: int) -> int:
    off = rng.choice((1, 2, 10) if total >= 10 else (1, 2))
    return total + off if total < off or rng.random() < 0.5 else total - off


def _far(rng: Random, total: int, most: int) -> int:
    while (other := rng.randint(0, 2 * most)) == total:
        pass
    return other
