"""Rules on a response's form: JSON, language, length, repetition."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from reward.types import Item, Verdict
from reward.verifiers.constraints import count_sentences, count_words
from reward.verifiers.language import is_language

TYPES: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "array": (list,),
        "boolean": (bool,),
        "integer": (int,),
        "null": (type(None),),
        "number": (int, float),
        "object": (dict,),
        "string": (str,),
    }
)
UNITS: Mapping[str, Callable[[str], int]] = MappingProxyType(
    {"characters": len, "sentences": count_sentences, "words": count_words}
)


def verify_json(item: Item) -> Verdict:
    """Whether the response is JSON and nothing else (a fence around it aside), and how far it fits.

    Without `keys` any JSON gets 1. With them the value must be an object, and the verdict is the
    share of the keys that are there with a value of their type; other keys are not looked at.
    NaN, Infinity and a key that stands twice are no JSON.

    Args:
        item: arguments {"keys": {name: type}} or {}; a type is a key of `TYPES`.
    Raises: ValueError for keys that are no such mapping.

    Example:
        >>> arguments = {"keys": {"name": "string", "age": "integer"}}
        >>> verify_json(Item((), '{"name": "Ada", "age": "36"}', arguments=arguments))
        Verdict(value=0.5, valid=True, reason='1 of 2 keys fit; not: age')
    """
    keys = item.arguments.get("keys", {})
    if not isinstance(keys, Mapping) or not all(kind in TYPES for kind in keys.values()):
        raise ValueError(
            f"Item.arguments['keys'] = {keys!r:.200} for verifier json; expected names with one of "
            f"{', '.join(TYPES)}"
        )
    body = re.sub(r"\A```(?:json)?[ \t]*\n|\n?```\Z", "", item.response.strip(), flags=re.I)
    try:
        value = json.loads(body, parse_constant=_refuse, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return Verdict(0.0, reason=f"no JSON: {error}")
    if not keys:
        return Verdict(1.0, reason="JSON")
    if not isinstance(value, dict):
        return Verdict(0.0, reason=f"JSON, but {type(value).__name__}, no object")
    wrong = [name for name, kind in keys.items() if name not in value or not _is(value[name], kind)]
    right = len(keys) - len(wrong)
    tail = f"; not: {', '.join(wrong)}" if wrong else ""
    return Verdict(right / len(keys), reason=f"{right} of {len(keys)} keys fit{tail}")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"key {twice[0]!r} stands twice")
    return dict(pairs)


def _is(value: object, kind: str) -> bool:
    # bool is an int to Python, and not to JSON.
    return isinstance(value, TYPES[kind]) and (kind == "boolean") == isinstance(value, bool)


def verify_language(item: Item) -> Verdict:
    """1 if the response is in the wanted language; not valid where that cannot be told.

    Args:
        item: arguments {"language": code}, a key of `reward.verifiers.language.LANGUAGES`.
    Raises: ValueError for another code or none.

    Example:
        >>> verify_language(Item((), "Das ist nicht der Hund.", arguments={"language": "de"})).value
        1.0
    """
    code = str(item.arguments.get("language", ""))
    answer = is_language(item.response, code)
    if answer is None:
        return Verdict(0.0, valid=False, reason=f"cannot tell whether it is {code}")
    return Verdict(float(answer), reason=f"is {'' if answer else 'not '}{code}")


def verify_length(item: Item) -> Verdict:
    """1 within the bounds; outside them the smaller of length / bound and bound / length.

    Args:
        item: arguments {"unit": key of `UNITS`, "min": count, "max": count}; one bound may be
            absent.
    Raises: ValueError for an unknown unit or bounds that are no counts in order.

    Example:
        >>> arguments = {"unit": "words", "min": 2, "max": 3}
        >>> verify_length(Item((), "one two three four", arguments=arguments))
        Verdict(value=0.75, valid=True, reason='4 words, more than 3')
    """
    unit = str(item.arguments.get("unit"))
    low, high = item.arguments.get("min", 0), item.arguments.get("max")
    is_bound = type(low) is int and (high is None or type(high) is int)
    if unit not in UNITS or not is_bound or not 0 <= low <= (low if high is None else high):
        raise ValueError(
            f"Item.arguments = {dict(item.arguments)!r:.200} for verifier length; expected 'unit', "
            f"one of {', '.join(UNITS)}, and counts 'min' <= 'max'"
        )
    length = UNITS[unit](item.response.strip())
    if length < low:
        return Verdict(length / low, reason=f"{length} {unit}, fewer than {low}")
    if high is not None and length > high:
        return Verdict(high / length, reason=f"{length} {unit}, more than {high}")
    return Verdict(1.0, reason=f"{length} {unit}")


def verify_repetition(item: Item) -> Verdict:
    """1 minus the share of the response's n-grams of words that have stood before in it.

    An empty response gets 0; one of fewer words than n repeats nothing.

    Args:
        item: arguments {"ngram": words, at least 1} or {}, which means 4.
    Raises: ValueError for another n.

    Example:
        >>> verify_repetition(Item((), "a b a b a b", arguments={"ngram": 2}))
        Verdict(value=0.4, valid=True, reason='3 of 5 2-grams stood before')
    """
    size = item.arguments.get("ngram", 4)
    if type(size) is not int or size < 1:
        raise ValueError(
            f"Item.arguments['ngram'] = {size!r} for verifier repetition; expected >= 1"
        )
    words = re.findall(r"\w+", item.response.lower())
    if not item.response.strip():
        return Verdict(0.0, reason="empty")
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    repeated = len(grams) - len(set(grams))
    share = repeated / len(grams) if grams else 0.0
    return Verdict(1 - share, reason=f"{repeated} of {len(grams)} {size}-grams stood before")
