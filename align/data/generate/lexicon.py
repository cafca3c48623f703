"""The words that procedural tasks are told in: few and common, so that a small model knows them."""

from __future__ import annotations

import re
from random import Random

GIRLS = (
    "Anna",
    "Cora",
    "Ella",
    "Gina",
    "Ida",
    "Kate",
    "Mary",
    "Nora",
    "Olga",
    "Rosa",
    "Tina",
    "Vera",
)
BOYS = ("Ben", "Dan", "Finn", "Hugo", "Jack", "Leo", "Max", "Otto", "Paul", "Sam", "Tom", "Will")
NAMES = (*GIRLS, *BOYS)
COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "gold", "grey", "silver")
# Every one takes a plain -s in the plural.
OBJECTS = (
    "lamp",
    "book",
    "cup",
    "ball",
    "coin",
    "key",
    "hat",
    "ring",
    "bell",
    "card",
    "cake",
    "chair",
    "clock",
    "coat",
    "drum",
    "flag",
    "flute",
    "jar",
    "kite",
    "map",
    "mug",
    "nail",
    "pen",
    "pin",
    "plate",
    "pot",
    "rope",
    "shell",
    "ship",
    "shoe",
    "sock",
    "spoon",
    "stamp",
    "star",
    "stone",
    "table",
    "ticket",
    "toy",
    "train",
    "watch",
)
ANIMALS = (
    "cat",
    "dog",
    "hen",
    "cow",
    "pig",
    "goat",
    "duck",
    "horse",
    "bird",
    "bear",
    "lion",
    "frog",
)
PLACES = (
    "garden",
    "market",
    "river",
    "school",
    "kitchen",
    "forest",
    "tower",
    "harbor",
    "bridge",
    "station",
)
ADJECTIVES = ("old", "new", "small", "big", "long", "warm", "cold", "quiet", "bright", "heavy")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

_PIECES = re.compile(r"[A-Za-z]+|[^\sA-Za-z]|\n")


def thing(rng: Random) -> str:
    """A coloured object, "red lamp"."""
    return f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}"


def filler(rng: Random) -> str:
    """A sentence that says nothing about anybody, about nine tokens.

    Example:
        >>> filler(Random(1))
        'We see a bear near the market.'
    """
    kind = rng.randrange(4)
    if kind == 0:
        return (
            f"The {rng.choice(ADJECTIVES)} {rng.choice(OBJECTS)} is near the {rng.choice(PLACES)}."
        )
    if kind == 1:
        return f"We see a {rng.choice(ANIMALS)} near the {rng.choice(PLACES)}."
    if kind == 2:
        return f"The {rng.choice(PLACES)} is {rng.choice(ADJECTIVES)} today."
    return f"A {rng.choice(ADJECTIVES)} {rng.choice(ANIMALS)} walks to the {rng.choice(PLACES)}."


def count_pieces(text: str) -> int:
    """Words, digits and marks in a text: its tokens under a tokenizer that knows these words.

    Example:
        >>> count_pieces("Anna: 42.")  # Anna, colon, space, 4, 2, full stop
        6
    """
    spaces_before_digits = len(re.findall(r" \d", text))
    return len(_PIECES.findall(text)) + spaces_before_digits


def is_girl(name: str) -> bool:
    return name in GIRLS
