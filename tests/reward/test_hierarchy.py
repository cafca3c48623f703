"""Laws of the tree: what overrules, what caps, what is left out, and that more is never less."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reward.hierarchy import HIERARCHY, Dimension, Hierarchy, Signal, sigmoid
from reward.types import Verdict

RULES = ("rule:math", "rule:constraints")
HEADS = tuple(f"head:{name}" for name in HIERARCHY.heads)


def heads(**values: float) -> dict[str, Verdict]:
    return {f"head:{name}": Verdict(value) for name, value in values.items()}


def test_a_rule_overrules_the_head_of_its_signal():
    signals = heads(correctness=9.0)
    wrong = HIERARCHY.score({**signals, "rule:math": Verdict(0.0)})
    assert (wrong.value, wrong.dimensions) == (0.0, {"correctness": 0.0})
    assert HIERARCHY.score(signals).value == pytest.approx(sigmoid(9.0))


def test_helpfulness_is_the_weighted_sum_of_its_signals():
    tree = Hierarchy(
        dimensions={
            "helpfulness": Dimension(
                signals={
                    "form": Signal(weight=3.0, verifiers=("constraints",), head=False),
                    "style": Signal(weight=1.0),
                }
            )
        }
    )
    score = tree.score({"rule:constraints": Verdict(0.5), "head:style": Verdict(0.0)})
    assert score.value == pytest.approx((3 * 0.5 + 1 * 0.5) / 4)
    only = tree.score({"head:style": Verdict(2.0)})
    assert only.value == pytest.approx(sigmoid(2.0))


def test_a_dimension_below_its_floor_caps_the_score():
    low = HIERARCHY.score({**heads(harmlessness=-4.0), "rule:math": Verdict(1.0)})
    assert low.value == pytest.approx(sigmoid(-4.0))
    assert low.reason == "capped: harmlessness 0.018 is below its floor"
    above = HIERARCHY.score({**heads(harmlessness=0.0), "rule:math": Verdict(1.0)})
    assert above.value > 0.5
    assert above.reason == ""


@given(st.floats(2.5, 50), st.floats(2.5, 50), st.floats(-5, 5), st.floats(0.01, 5))
def test_beyond_harmless_enough_only_the_other_dimensions_decide(first, second, style, more):
    gate = {"correctness": 0.0, "helpfulness": 0.0, "harmlessness": 1.0}
    refusal = HIERARCHY.score(heads(harmlessness=first, style=style), gate)
    answer = HIERARCHY.score(heads(harmlessness=second, style=style + more), gate)
    assert answer.value > refusal.value


def test_the_gate_weighs_and_its_limits_hold():
    signals = {**heads(harmlessness=0.0, style=0.0), "rule:math": Verdict(1.0)}
    # Declared 0.5, 0.3, 0.2; the gate's 0.8 is cut to harmlessness' max_share of 0.5.
    cut = {"correctness": 0.2, "helpfulness": 0.0, "harmlessness": 0.8}
    assert HIERARCHY.score(signals).value == pytest.approx(0.5 * 1.0 + 0.5 * 0.5)
    assert HIERARCHY.score(signals, cut).value == pytest.approx(0.5 * 1.0 + 0.5 * 0.5)
    free = {"correctness": 0.6, "helpfulness": 0.2, "harmlessness": 0.2}
    assert HIERARCHY.score(signals, free).value == pytest.approx(0.6 * 1.0 + 0.4 * 0.5)


def test_limits_that_leave_no_room_share_it():
    tree = Hierarchy(
        dimensions={
            "helpfulness": Dimension(signals={"a": Signal()}, max_share=0.2),
            "harmlessness": Dimension(signals={"b": Signal()}, max_share=0.6),
        }
    )
    score = tree.score({"head:a": Verdict(-99.0), "head:b": Verdict(99.0)})
    assert score.value == pytest.approx(0.6 / 0.8)


def test_a_head_without_a_verdict_is_left_out():
    invalid = Verdict(-99.0, valid=False, reason="nothing to read")
    with_it = HIERARCHY.score({**heads(correctness=1.0), "head:style": invalid})
    without = HIERARCHY.score(heads(correctness=1.0))
    assert (with_it.value, with_it.dimensions) == (without.value, without.dimensions)
    assert with_it.signals["head:style"] is invalid


def test_a_rule_without_a_verdict_leaves_the_item_without_a_score():
    signals = {**heads(correctness=3.0, style=3.0), "rule:math": Verdict(0.0, False, "timed out")}
    score = HIERARCHY.score(signals)
    assert (score.valid, score.reason) == (False, "math: timed out")


def test_no_valid_signal_means_no_valid_score():
    for signals in ({}, {"head:style": Verdict(1.0, valid=False)}):
        score = HIERARCHY.score(signals)
        assert (score.valid, score.reason) == (False, "no signal has a verdict")
        assert score.version == HIERARCHY.version


verdicts = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.floats(0, 1).map(Verdict) for name in RULES},
        **{name: st.floats(-20, 20).map(Verdict) for name in HEADS},
    },
)


@given(verdicts, st.data())
def test_a_higher_signal_never_lowers_the_score_and_the_score_is_pure(signals, data):
    score = HIERARCHY.score(signals)
    assert HIERARCHY.score(dict(signals)) == score
    if not signals:
        return
    assert 0 <= score.value <= 1
    name = data.draw(st.sampled_from(sorted(signals)))
    top = 1.0 if name in RULES else 20.0
    raised = data.draw(st.floats(signals[name].value, top))
    better = HIERARCHY.score({**signals, name: Verdict(raised)})
    assert better.value >= score.value - 1e-12


def test_the_version_is_the_tree_and_survives_json():
    again = Hierarchy.model_validate_json(HIERARCHY.model_dump_json())
    assert again == HIERARCHY
    assert again.version == HIERARCHY.version
    changed = HIERARCHY.model_copy(update={"gate": "learned"})
    assert changed.version != HIERARCHY.version


@pytest.mark.parametrize(
    ("signals", "gate", "message"),
    [
        ({"head:charm": Verdict(1.0)}, None, "signal 'head:charm' is not in hierarchy 'default'"),
        ({"rule:math": Verdict(1.5)}, None, "signal 'rule:math' = 1.5, expected 0 to 1"),
        ({"head:style": Verdict(math.nan)}, None, "'head:style' = nan, expected a finite number"),
        ({"head:style": Verdict(1.0)}, {"correctness": 1.0}, "gate weighs correctness, expected"),
        (
            {"head:style": Verdict(1.0)},
            {"correctness": 1.0, "helpfulness": 0.0, "harmlessness": 0.0},
            "expected finite weights >= 0, not all 0",
        ),
    ],
)
def test_wrong_input_is_an_error(signals, gate, message):
    with pytest.raises(ValueError, match=message):
        HIERARCHY.score(signals, gate)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kindness": {"signals": {"a": {}}}}, "dimensions.kindness"),
        ({"helpfulness": {"signals": {}}}, "at least 1 item"),
        ({"helpfulness": {"signals": {"a": {"wieght": 1.0}}}}, "Extra inputs are not permitted"),
        ({"helpfulness": {"signals": {"a": {"weight": "1"}}}}, "valid number"),
        (
            {"helpfulness": {"signals": {"a": {"verifiers": ["maths"]}}}},
            "verifiers = maths, expected some of code, constraints, exact, facts, json, judge",
        ),
        ({"helpfulness": {"signals": {"a": {"head": False}}}}, "leave no judge; give one of them"),
        (
            {"helpfulness": {"signals": {"a": {}}, "floor": 0.5, "ceiling": 0.4}},
            "floor = 0.5, expected at most ceiling = 0.4",
        ),
        (
            {"helpfulness": {"signals": {"a": {}}}, "correctness": {"signals": {"a": {}}}},
            "signal a stands twice; keep it in one place",
        ),
        (
            {
                "helpfulness": {"signals": {"a": {"verifiers": ["math"]}}},
                "correctness": {"signals": {"b": {"verifiers": ["math"]}}},
            },
            "verifier math stands twice",
        ),
        ({"helpfulness": {"signals": {"overall": {}}}}, "'overall' is the name of the whole score"),
    ],
)
def test_a_wrong_tree_is_an_error(tree, message):
    with pytest.raises(ValidationError, match=message):
        Hierarchy.model_validate({"dimensions": tree})
