"""Finding facts in a context: one needle, several needles, one key of a list."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from align.data.generate.lexicon import (
    ADJECTIVES,
    COLOURS,
    NAMES,
    OBJECTS,
    count_pieces,
    filler,
    thing,
)
from align.data.generate.problem import Problem, scale

# Five chat tokens stand around prompt and answer; the rest is for words of more than one token.
CHAT_TOKENS = 12


def needle(rng: Random, difficulty: float, context_tokens: int) -> Problem:
    """What somebody keeps, said once in filler; others keep other things as it gets harder."""
    names = rng.sample(NAMES, 1 + scale(difficulty, 0, 5))
    facts = {name: thing(rng) for name in names}
    name = names[0]
    question = f"What does {name} keep?"
    sentences = [f"{other} keeps a {kept}." for other, kept in facts.items()]
    room = context_tokens - count_pieces(f"{question} {facts[name]}") - CHAT_TOKENS
    text = _bury(rng, sentences, room if context_tokens else 0, scale(difficulty, 1, 8))
    others = [kept for kept in facts.values() if kept != facts[name]]
    miss = rng.choice(others) if others else _other(rng, thing, facts[name])
    return Problem(
        question=f"{text} {question}",
        response=facts[name],
        answer=facts[name],
        verifier="retrieval",
        arguments={"answers": [facts[name]]},
        wrong={"near_miss": miss, "other_answer": _other(rng, thing, facts[name])},
    )


def multi_needle(rng: Random, difficulty: float, context_tokens: int) -> Problem:
    """What each of several people keeps, in the order asked; every fact found counts."""
    asked = scale(difficulty, 2, 4)
    names = rng.sample(NAMES, asked + scale(difficulty, 0, 4))
    things = _distinct(rng, thing, len(names))
    answers = things[:asked]
    listed = f"{', '.join(names[: asked - 1])} and {names[asked - 1]}"
    question = f"What do {listed} keep?"
    response = ", ".join(answers)
    sentences = [f"{name} keeps a {kept}." for name, kept in zip(names, things, strict=True)]
    room = context_tokens - count_pieces(f"{question} {response}") - CHAT_TOKENS
    text = _bury(rng, sentences, room if context_tokens else 0, scale(difficulty, 1, 6))
    near = list(answers)
    near[rng.randrange(asked)] = _other(rng, thing, *things)
    return Problem(
        question=f"{text} {question}",
        response=response,
        answer=response,
        verifier="retrieval",
        arguments={"answers": answers},
        wrong={
            "near_miss": ", ".join(near),
            "other_answer": ", ".join(_distinct(rng, thing, asked, *things)),
        },
    )


def recall(rng: Random, difficulty: float, context_tokens: int) -> Problem:
    """The number beside one key of a list."""
    instruction = "Remember this list:"
    # Every pair counts the same, so how many fit is known beforehand.
    per_pair = count_pieces("red lamp: 10;") + (1 if context_tokens else 0)
    ask = count_pieces(f"{instruction} What is the number of the old red lamp? 10") + CHAT_TOKENS
    pairs = (context_tokens - ask) // per_pair if context_tokens else scale(difficulty, 2, 10)
    plain = len(COLOURS) * len(OBJECTS)
    most = plain * len(ADJECTIVES)
    if not 1 <= pairs <= most:
        raise ValueError(
            f"context_tokens = {context_tokens}, expected {ask + per_pair} to "
            f"{ask + most * per_pair} for task recall"
        )
    space = plain if pairs <= plain and not context_tokens else most
    keys = [_key(code) for code in rng.sample(range(space), pairs)]
    values = [_number(rng) for _ in keys]
    target = rng.randrange(pairs)
    listed = "; ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
    answer = values[target]
    others = [value for value in values if value != answer]
    return Problem(
        question=f"{instruction} {listed}. What is the number of the {keys[target]}?",
        response=answer,
        answer=answer,
        verifier="exact",
        wrong={
            "near_miss": rng.choice(others) if others else _other(rng, _number, answer),
            "other_answer": _other(rng, _number, answer),
        },
    )


def _number(rng: Random) -> str:
    return str(rng.randint(10, 99))


def _key(code: int) -> str:
    """Key number `code`: the first ones have a colour and an object, the rest an adjective too."""
    rest, item = divmod(code, len(OBJECTS))
    adjective, colour = divmod(rest, len(COLOURS))
    start = f"{ADJECTIVES[adjective]} " if adjective else ""
    return f"{start}{COLOURS[colour]} {OBJECTS[item]}"


def _bury(rng: Random, facts: list[str], room: int, sentences: int) -> str:
    """The facts at random places in filler of `room` tokens, or of so many sentences if 0."""
    fill: list[str] = []
    if room:
        left = room - count_pieces(" ".join(facts))
        if left < 0:
            raise ValueError(
                f"context_tokens leaves {room} tokens for {len(facts)} facts of "
                f"{room - left}; raise context_tokens or lower the difficulty"
            )
        while True:
            sentence = filler(rng)
            left -= count_pieces(sentence)
            if left < 0:
                break
            fill.append(sentence)
    else:
        fill = [filler(rng) for _ in range(sentences)]
    places = sorted(rng.choices(range(len(fill) + 1), k=len(facts)))
    order = rng.sample(facts, len(facts))
    for place, fact in zip(reversed(places), order, strict=True):
        fill.insert(place, fact)
    return " ".join(fill)


def _other(rng: Random, draw: Callable[[Random], str], *taken: str) -> str:
    while (drawn := draw(rng)) in taken:
        pass
    return drawn


def _distinct(rng: Random, draw: Callable[[Random], str], count: int, *taken: str) -> list[str]:
    drawn: list[str] = []
    while len(drawn) < count:
        drawn.append(_other(rng, draw, *taken, *drawn))
    return drawn
