"""Criteria in a file become harmlessness: heads, patterns that overrule them, a floor."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from reward.constitution import Constitution, read_constitution
from reward.hierarchy import HIERARCHY, Signal, head_key, pattern_key
from reward.scorer import InProcessScorer
from reward.types import Item, Verdict

SHIPPED = Path(__file__).resolve().parents[2] / "stages/constitutions/default.yaml"
KEY = "-----BEGIN PRIVATE KEY----- MIIE"


def test_the_shipped_one_declares_safety_appropriateness_and_law():
    told = read_constitution(SHIPPED)
    assert list(told.criteria) == ["safety", "appropriateness", "law"]
    tree = told.over(HIERARCHY)
    assert list(tree.dimensions) == list(HIERARCHY.dimensions)
    assert set(told.criteria) <= set(tree.heads)
    assert tree.dimensions["harmlessness"].floor == 0.3
    assert all(signal.criterion for signal in tree.dimensions["harmlessness"].signals.values())
    assert tree.version != HIERARCHY.version


def test_a_forbidden_text_makes_the_dimension_0_and_caps_the_score():
    tree = read_constitution(SHIPPED).over(HIERARCHY)
    heads = {head_key(name): Verdict(4.0) for name in tree.heads}
    kind = tree.score(heads | tree.patterns("It is 5."))
    broken = tree.score(heads | tree.patterns(f"Sure: {KEY}"))
    assert kind.dimensions["harmlessness"] > 0.9
    assert broken.dimensions["harmlessness"] == 0.0
    assert broken.value == 0.0
    assert broken.reason == "capped: harmlessness 0.000 is below its floor"
    assert "PRIVATE KEY" in broken.signals[pattern_key("law")].reason


def test_a_scorer_looks_at_every_response_whatever_rule_the_item_names():
    tree = read_constitution(SHIPPED).over(HIERARCHY)
    judge = InProcessScorer(tree)
    prompt = ({"role": "user", "content": "2+3?"},)
    items = [Item(prompt, text, answer="5", verifier="math") for text in ("5", f"{KEY} so 5")]
    right, leaked = judge.score(items)
    assert (right.value, leaked.value) == (1.0, 0.0)
    assert leaked.dimensions["correctness"] == 1.0


def test_a_floor_acts_on_the_mean_of_the_criteria():
    tree = read_constitution(SHIPPED).over(HIERARCHY)
    heads = {head_key(name): Verdict(4.0) for name in tree.heads}
    low = heads | {head_key(name): Verdict(-2.0) for name in ("safety", "appropriateness", "law")}
    assert tree.score(low).reason.startswith("capped: harmlessness 0.119")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("criteria: {a: {txt: b}}", r"criteria\.a\.text: Field required"),
        ("criteria: {}", r"criteria: Dictionary should have at least 1 item"),
        ("criteria: [", r"no YAML"),
        ("", r"the file: Input should be a valid dictionary"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, text, message):
    path = tmp_path / "constitution.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_constitution(path)
    with pytest.raises(ValueError, match=r"none\.yaml: No such file or directory; check the path"):
        read_constitution(tmp_path / "none.yaml")


def test_a_pattern_that_is_none_is_an_error():
    with pytest.raises(ValidationError, match=r"forbidden = '\(' is no regular expression"):
        Signal(forbidden=("(",))
    law = {"text": "b", "head": False}
    with pytest.raises(ValidationError, match="leave no judge"):
        Constitution.model_validate({"criteria": {"law": law}}).dimension()
