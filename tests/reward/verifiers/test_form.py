"""Rules on form: JSON, language, length, repetition."""

from __future__ import annotations

import pytest

from reward.types import Item, Verdict
from reward.verifiers import verify


def judge(rule: str, response: str, **arguments: object) -> Verdict:
    return verify(Item((), response, verifier=rule, arguments=arguments))


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ('{"a": 1}', 1.0),
        ("[1, 2]", 1.0),
        ('```json\n{"a": 1}\n```', 1.0),
        ('```\n{"a": 1}\n```', 1.0),
        ('Here: {"a": 1}', 0.0),
        ("{'a': 1}", 0.0),
        ('{"a": NaN}', 0.0),
        ('{"a": 1, "a": 2}', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_is_json_and_nothing_else(response, value):
    verdict = judge("json", response)
    assert (verdict.value, verdict.valid) == (value, True)


def test_keys_give_their_share():
    keys = {"name": "string", "age": "integer", "ok": "boolean", "tags": "array"}
    assert judge("json", '{"name": "A", "age": 3, "ok": true, "tags": []}', keys=keys).value == 1
    verdict = judge("json", '{"name": "A", "age": true, "ok": 1, "more": 0}', keys=keys)
    assert verdict == Verdict(0.25, reason="1 of 4 keys fit; not: age, ok, tags")
    assert judge("json", "[1]", keys=keys) == Verdict(0.0, reason="JSON, but list, no object")


@pytest.mark.parametrize("keys", [["name"], {"name": "text"}, "name"])
def test_keys_are_names_with_types(keys):
    with pytest.raises(ValueError, match=r"Item.arguments\['keys'\] = .* for verifier json; exp"):
        judge("json", "{}", keys=keys)


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("Das ist nicht der Hund.", Verdict(1.0, reason="is de")),
        ("This is not the dog of the man.", Verdict(0.0, reason="is not de")),
        ("Tee", Verdict(0.0, valid=False, reason="cannot tell whether it is de")),
    ],
)
def test_language_is_told_or_left_open(response, verdict):
    assert judge("language", response, language="de") == verdict


def test_an_unknown_language_is_an_error():
    with pytest.raises(ValueError, match="language = '', expected one of ar"):
        judge("language", "x")


@pytest.mark.parametrize(
    ("response", "arguments", "value"),
    [
        ("one two three", {"unit": "words", "min": 2, "max": 3}, 1.0),
        ("one", {"unit": "words", "min": 4}, 0.25),
        ("one two three four", {"unit": "words", "max": 2}, 0.5),
        ("abcd", {"unit": "characters", "max": 4}, 1.0),
        ("One. Two.", {"unit": "sentences", "min": 2, "max": 2}, 1.0),
        ("", {"unit": "words", "min": 4}, 0.0),
        ("x", {"unit": "words", "max": 0}, 0.0),
    ],
)
def test_length_falls_with_the_distance_from_its_bounds(response, arguments, value):
    assert judge("length", response, **arguments).value == value


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"unit": "tokens", "min": 1},
        {"unit": "words", "min": 3, "max": 2},
        {"unit": "words", "min": -1},
        {"unit": "words", "max": 2.5},
        {"unit": "words", "min": None},
    ],
)
def test_length_needs_a_unit_and_bounds_in_order(arguments):
    with pytest.raises(ValueError, match="for verifier length; expected 'unit', one of charact"):
        judge("length", "x", **arguments)


@pytest.mark.parametrize(
    ("response", "arguments", "value"),
    [
        ("all of these words differ here", {}, 1.0),
        ("tea tea tea tea tea", {"ngram": 1}, 0.2),
        ("a b a b a b", {"ngram": 2}, 0.4),
        ("A b, a B!", {"ngram": 2}, 1 - 1 / 3),
        ("short", {}, 1.0),
        ("!?", {}, 1.0),
        (" ", {}, 0.0),
    ],
)
def test_repetition_is_the_share_of_n_grams_that_stood_before(response, arguments, value):
    assert judge("repetition", response, **arguments).value == pytest.approx(value)


@pytest.mark.parametrize("size", [0, 2.0, "4", True])
def test_repetition_counts_whole_words(size):
    with pytest.raises(ValueError, match="for verifier repetition; expected >= 1"):
        judge("repetition", "x", ngram=size)
