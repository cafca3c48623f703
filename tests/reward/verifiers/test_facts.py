"""The facts rule: supported, contradicted, or unknown."""

from __future__ import annotations

import pytest

from reward.types import Item, Verdict
from reward.verifiers import verify

MOON = ["14 December 1972 UTC", "December 1972"]
UNKNOWN = Verdict(0.0, valid=False, reason="unknown: no reference supports or contradicts it")


def judge(response: str, answers: object) -> Verdict:
    return verify(Item((), response, verifier="facts", arguments={"answers": answers}))


@pytest.mark.parametrize(
    ("response", "answers"),
    [
        ("December 1972", MOON),
        ("It was in december, 1972.", MOON),
        ("The answer is 14 December 1972 UTC!", MOON),
        ("one season", ["one", "one season"]),
        ("1", ["one"]),
        ("There are about 1,200.", ["1200"]),
        ("Beyonce", ["Beyonc\u00e9"]),
        ("The United States", ["USA", "United States"]),
        ("Yes.", ["yes"]),
        ("to be or not to be", ["To be, or not to be"]),
    ],
)
def test_a_name_of_the_answer_supports(response, answers):
    verdict = judge(response, answers)
    assert (verdict.value, verdict.valid) == (1.0, True)
    assert verdict.reason.startswith("supported: ")


@pytest.mark.parametrize(
    ("response", "answers", "reason"),
    [
        ("It was 1969.", ["1972"], "contradicted: 1969, not 1972"),
        ("two", ["3", "three"], "contradicted: 2, not 3"),
        ("No", ["yes"], "contradicted: no, not yes"),
    ],
)
def test_another_number_or_yes_and_no_contradict(response, answers, reason):
    assert judge(response, answers) == Verdict(0.0, reason=reason)


@pytest.mark.parametrize(
    ("response", "answers"),
    [
        ("", MOON),
        ("1972", MOON),
        ("Not in December 1972", MOON),
        ("December 1972 or July 1969", MOON),
        ("Bob", ["Robert"]),
        ("America", ["USA", "United States"]),
        ("1969", ["nineteen seventy-two", "1972"]),
        ("Yes", ["3"]),
        ("It is it is it", ["tea"]),
    ],
)
def test_anything_else_is_unknown(response, answers):
    assert judge(response, answers) == UNKNOWN


@pytest.mark.parametrize("answers", [None, [], "1972", [1972], [" "], ["?"]])
def test_names_are_needed(answers):
    with pytest.raises(ValueError, match=r"Item.arguments\['answers'\] = .* for verifier facts; e"):
        judge("x", answers)
