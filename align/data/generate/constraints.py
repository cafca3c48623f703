"""Instructions whose form can be checked: case, length, words to use or leave out, format.

The ids and arguments are IFEval's, so the same verifier judges these and the real benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from align.data.generate.lexicon import ANIMALS, COLOURS, NAMES, NUMBERS, OBJECTS, PLACES
from align.data.generate.problem import Problem, scale

CATEGORIES = {
    "animals": ANIMALS,
    "colours": COLOURS,
    "things": OBJECTS,
    "places": PLACES,
}


@dataclass(frozen=True)
class Draft:
    """A response while it is made to keep or break constraints."""

    words: tuple[str, ...]
    case: str = "plain"
    comma: bool = True
    quoted: bool = False
    bullets: bool = False
    extra: tuple[str, ...] = ()

    def text(self) -> str:
        words = (*self.words, *self.extra)
        text = (", " if self.comma else " ").join(words)
        if self.bullets:
            text = "\n".join(f"* {word}" for word in words)
        text = text.upper() if self.case == "upper" else text
        text = text.title() if self.case == "title" else text
        return f'"{text}"' if self.quoted else text


@dataclass(frozen=True)
class Constraint:
    """One instruction: how it is said and checked, and how a draft keeps or breaks it."""

    said: str
    checks: tuple[tuple[str, dict[str, Any]], ...]
    keep: Callable[[Draft], Draft]
    violate: Callable[[Draft], Draft]


def constraints(rng: Random, difficulty: float, context_tokens: int) -> Problem:
    """A few things named under one constraint at 0, under three at 1."""
    category = rng.choice(tuple(CATEGORIES))
    count = rng.randint(2, 4)
    draft = Draft(tuple(rng.sample(CATEGORIES[category], count)))
    names = rng.sample(tuple(MAKERS), len(MAKERS))
    chosen: list[Constraint] = []
    kinds: set[str] = set()
    for name in names:
        if len(chosen) == scale(difficulty, 1, 3):
            break
        if not kinds & CLASHES[name]:
            kinds |= CLASHES[name]
            chosen.append(MAKERS[name](rng, draft, category))
    for constraint in chosen:
        draft = constraint.keep(draft)
    broken = rng.choice(chosen).violate(draft)
    checks = [check for constraint in chosen for check in constraint.checks]
    said = " ".join(constraint.said for constraint in chosen)
    request = f"Name {NUMBERS[count]} {category} for {rng.choice(NAMES)}."
    return Problem(
        question=f"{request} {said}",
        response=draft.text(),
        verifier="constraints",
        arguments={
            "instruction_id_list": [name for name, _ in checks],
            "kwargs": [kwargs for _, kwargs in checks],
        },
        wrong={"violated": broken.text()},
    )


def _upper(rng: Random, draft: Draft, category: str) -> Constraint:
    return Constraint(
        "Use only capital letters.",
        (("change_case:english_capital", {}),),
        lambda d: replace(d, case="upper"),
        lambda d: replace(d, case="plain"),
    )


def _lower(rng: Random, draft: Draft, category: str) -> Constraint:
    return Constraint(
        "Use only small letters.",
        (("change_case:english_lowercase", {}),),
        lambda d: replace(d, case="plain"),
        lambda d: replace(d, case=rng.choice(("upper", "title"))),
    )


def _exactly(rng: Random, draft: Draft, category: str) -> Constraint:
    count = len(draft.words)
    others = [word for word in CATEGORIES[category] if word not in draft.words]
    return Constraint(
        f"Use exactly {NUMBERS[count]} words.",
        (
            ("length_constraints:number_words", {"relation": "at least", "num_words": count}),
            ("length_constraints:number_words", {"relation": "less than", "num_words": count + 1}),
        ),
        lambda d: d,
        lambda d: replace(
            d, words=d.words[:-1] if rng.random() < 0.5 else (*d.words, rng.choice(others))
        ),
    )


def _no_comma(rng: Random, draft: Draft, category: str) -> Constraint:
    return Constraint(
        "Do not use a comma.",
        (("punctuation:no_comma", {}),),
        lambda d: replace(d, comma=False),
        lambda d: replace(d, comma=True),
    )


def _ending(rng: Random, draft: Draft, category: str) -> Constraint:
    last = rng.choice(("done", "thanks", "bye", "amen"))
    return Constraint(
        f"End with the word {last}.",
        (("startend:end_checker", {"end_phrase": last}),),
        lambda d: replace(d, extra=(last,)),
        lambda d: replace(d, extra=()),
    )


def _use(rng: Random, draft: Draft, category: str) -> Constraint:
    word = rng.choice(draft.words)
    others = [other for other in CATEGORIES[category] if other not in draft.words]
    return Constraint(
        f"Use the word {word}.",
        (("keywords:existence", {"keywords": [word]}),),
        lambda d: d,
        lambda d: replace(d, words=tuple(rng.choice(others) if w == word else w for w in d.words)),
    )


def _avoid(rng: Random, draft: Draft, category: str) -> Constraint:
    word = rng.choice([other for other in CATEGORIES[category] if other not in draft.words])
    return Constraint(
        f"Do not use the word {word}.",
        (("keywords:forbidden_words", {"forbidden_words": [word]}),),
        lambda d: d,
        lambda d: replace(d, words=(word, *d.words[1:])),
    )


def _quoted(rng: Random, draft: Draft, category: str) -> Constraint:
    return Constraint(
        "Put quotes around it.",
        (("startend:quotation", {}),),
        lambda d: replace(d, quoted=True),
        lambda d: replace(d, quoted=False),
    )


def _bullets(rng: Random, draft: Draft, category: str) -> Constraint:
    count = len(draft.words)
    return Constraint(
        f"Make a list with {NUMBERS[count]} bullets.",
        (("detectable_format:number_bullet_lists", {"num_bullets": count}),),
        lambda d: replace(d, bullets=True),
        lambda d: replace(d, bullets=False),
    )


MAKERS: dict[str, Callable[[Random, Draft, str], Constraint]] = {
    "upper": _upper,
    "lower": _lower,
    "exactly": _exactly,
    "no_comma": _no_comma,
    "ending": _ending,
    "use": _use,
    "avoid": _avoid,
    "quoted": _quoted,
    "bullets": _bullets,
}
# Two constraints that share a mark cannot be kept together, or one hides a breach of the other.
CLASHES = {
    "upper": {"case"},
    "lower": {"case"},
    "exactly": {"count"},
    "no_comma": {"layout"},
    "ending": {"count", "end", "layout"},
    "use": {"word"},
    "avoid": {"word"},
    "quoted": {"end", "layout"},
    "bullets": {"layout"},
}
