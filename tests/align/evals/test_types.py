from __future__ import annotations

import json
import math

import pytest

from align.evals.types import EvalResult, compare

NAN = math.nan


def test_items_without_a_verdict_are_left_out_of_the_mean_but_keep_their_place() -> None:
    result = EvalResult.from_items("math", "accuracy", [1.0, NAN, 0.0])
    assert (result.value, result.num_items, result.details["no_verdict"]) == (0.5, 3, 1.0)
    assert result.stderr == pytest.approx(0.5)
    assert math.isnan(result.items[1])


def test_no_verdict_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="eval math: none of 2 items has a verdict"):
        EvalResult.from_items("math", "accuracy", [NAN, NAN])


def test_json_is_strict_and_comes_back() -> None:
    result = EvalResult.from_items("w", "win_rate", [1.0, NAN], baseline=0.5, details={"a": 1.0})
    text = result.to_json()
    assert json.loads(text)["items"] == [1.0, None]
    back = EvalResult.from_json(text)
    assert repr(back) == repr(result)


def test_pairing_cancels_what_both_share() -> None:
    hard = [0.0, 1.0] * 50
    before = EvalResult.from_items("lm", "nll", hard)
    after = EvalResult.from_items("lm", "nll", [item - 0.1 for item in hard])
    change = compare(before, after)
    assert change.value == pytest.approx(-0.1)
    assert change.stderr < 1e-9 < before.stderr
    assert change.is_loss
    assert not change.is_gain


def test_for_losses_down_is_a_gain() -> None:
    before = EvalResult("lm", "nll", 2.0, 0.0, 2, (2.0, 2.0), higher_is_better=False)
    after = EvalResult("lm", "nll", 1.0, 0.0, 2, (1.0, 1.0), higher_is_better=False)
    assert compare(before, after).is_gain


def test_a_relative_eval_is_compared_with_its_baseline() -> None:
    after = EvalResult.from_items("w", "win_rate", [1.0, 1.0, 0.5, 1.0], baseline=0.5)
    change = compare(None, after)
    assert change.value == pytest.approx(0.375)
    assert change.is_gain


def test_items_are_paired_only_where_both_have_a_verdict() -> None:
    before = EvalResult.from_items("m", "accuracy", [0.0, NAN, 1.0])
    after = EvalResult.from_items("m", "accuracy", [1.0, 1.0, NAN])
    assert (compare(before, after).num_items, compare(before, after).value) == (1, 1.0)


def test_what_cannot_be_compared_says_why() -> None:
    two = EvalResult.from_items("m", "accuracy", [0.0, NAN])
    three = EvalResult.from_items("m", "accuracy", [0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"cannot compare m \(accuracy, 2 items\) with m"):
        compare(two, three)
    with pytest.raises(ValueError, match="eval m: a change needs the parent's result"):
        compare(None, three)
    other = EvalResult.from_items("m", "accuracy", [NAN, 1.0])
    with pytest.raises(ValueError, match="eval m: no item has a verdict for both"):
        compare(two, other)
