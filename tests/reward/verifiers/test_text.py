"""Exact and retrieval rules, and the dispatch by name."""

from __future__ import annotations

import pytest

from reward.types import Item
from reward.verifiers import VERIFIERS, verify


def exact(response, answer="Ab c"):
    return verify(Item((), response, answer=answer, verifier="exact")).value


def retrieve(response, answers):
    return verify(Item((), response, verifier="retrieval", arguments={"answers": answers}))


def test_exact_forgives_outer_space_only():
    assert [exact(r) for r in ("Ab c", " Ab c\n", "ab c", "Ab  c", "Ab c.")] == [1, 1, 0, 0, 0]


def test_exact_needs_an_answer():
    with pytest.raises(ValueError, match=r"Item.answer = '' for verifier exact"):
        exact("x", "")


@pytest.mark.parametrize(
    ("response", "answers", "value"),
    [
        ("The codes are 12, 34 and 56.", ["12", "34", "56"], 1.0),
        ("The codes are 12 and 345.", ["12", "34"], 0.5),
        ("paris", ["Paris"], 1.0),
        ("New\nYork", ["New York"], 1.0),
        ("It costs $5.", ["$5"], 1.0),
        ("C++ and C", ["C++"], 1.0),
        ("cats", ["cat"], 0.0),
        ("", ["cat"], 0.0),
    ],
)
def test_retrieval_counts_whole_words(response, answers, value):
    verdict = retrieve(response, answers)
    assert verdict.valid
    assert verdict.value == pytest.approx(value)


def test_retrieval_names_what_is_missing():
    assert retrieve("12", ["12", "34"]).reason == "1 of 2 answers found; missing: 34"


@pytest.mark.parametrize("answers", [None, [], "12", [12], [" "]])
def test_retrieval_needs_answers(answers):
    with pytest.raises(ValueError, match=r"Item.arguments\['answers'\] = .* expected a list"):
        retrieve("12", answers)


def test_an_unknown_verifier_lists_the_known_ones():
    with pytest.raises(ValueError, match="'maths', expected one of code, constraints, exact, fa"):
        verify(Item((), "5", verifier="maths"))


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        VERIFIERS["mine"] = verify  # type: ignore[index]
