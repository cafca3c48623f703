"""The exact rule for a short statement of fact: supported, contradicted, or unknown.

A reference is a list of names for one thing ("United States", "USA"). A response supports it if it
says one of the names and, beside it, only words that state nothing ("It was the ..."). It
contradicts it if what is left is of a closed kind, a number or yes or no, and the reference is of
the same kind and another. Anything else (a name that is not on the list, a longer text, a negation)
is unknown: no verdict, because a list of names cannot tell an alias that it lacks from an error.
"""

from __future__ import annotations

import re
import unicodedata

from reward.types import Item, Verdict

_FILLER_WORDS = """
a an and answer approximately are around at about be been by correct did does final for from had has
have he her his in is it its of on s she that the their there these they this to total was were will
with would
"""
_NUMBER_WORDS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen twenty
"""
_FILLER = frozenset(_FILLER_WORDS.split())
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}


def verify_facts(item: Item) -> Verdict:
    """1 if the response states the reference answer, 0 if it states another; else no verdict.

    Args:
        item: arguments {"answers": [name, ...]}, the names of one right answer.
    Raises: ValueError if there are none, or one is empty or no text.

    Example:
        >>> arguments = {"answers": ["14 December 1972", "December 1972"]}
        >>> verify_facts(Item((), "It was in December 1972.", arguments=arguments)).reason
        'supported: december 1972'
        >>> verify_facts(Item((), "Two.", arguments={"answers": ["3"]})).reason
        'contradicted: 2, not 3'
        >>> verify_facts(Item((), "Not in 1972", arguments=arguments)).valid
        False
    """
    answers = item.arguments.get("answers")
    if not isinstance(answers, list | tuple) or not answers:
        answers = [None]
    if not all(isinstance(answer, str) and normalise(answer) for answer in answers):
        raise ValueError(
            f"Item.arguments['answers'] = {item.arguments.get('answers')!r:.200} for verifier "
            "facts; expected a list of one name or more, none empty"
        )
    said = normalise(item.response)
    names = [normalise(answer) for answer in answers]
    for name in names:
        if _states(said, name):
            return Verdict(1.0, reason=f"supported: {' '.join(name)}")
    kind = _kind(said)
    if kind and all(_kind(name) == kind for name in names):
        content = next(word for word in said if word not in _FILLER)
        return Verdict(0.0, reason=f"contradicted: {content}, not {' '.join(names[0])}")
    return Verdict(0.0, valid=False, reason="unknown: no reference supports or contradicts it")


def normalise(text: str) -> list[str]:
    """Words in lower case without accents; number words to twenty and digit groups as digits.

    Example:
        >>> normalise("The Café's 1,200 items, twelve.")
        ['the', 'cafe', 's', '1200', 'items', '12']
    """
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(sign for sign in plain if not unicodedata.combining(sign))
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", plain)
    return [_NUMBERS.get(word, word) for word in re.findall(r"\d+\.\d+|\w+", plain)]


def _states(said: list[str], name: list[str]) -> bool:
    """Whether the name stands in what was said with nothing but fillers around it."""
    size = len(name)
    return any(
        said[start : start + size] == name
        and _FILLER.issuperset(said[:start] + said[start + size :])
        for start in range(len(said) - size + 1)
    )


def _kind(words: list[str]) -> str:
    """`number` or `truth` if that is what the words are, fillers aside; else ""."""
    content = [word for word in words if word not in _FILLER]
    if len(content) != 1:
        return ""
    if content[0] in ("yes", "no", "true", "false"):
        return "truth"
    return "number" if re.fullmatch(r"\d+(?:\.\d+)?", content[0]) else ""
