"""Laws of group advantages, and TRL's numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from align.advantage import Scale, advantages
from reward.types import Score


def group(*values: float | None) -> list[Score]:
    return [Score(0.0 if v is None else v, valid=v is not None) for v in values]


SCALES: tuple[Scale, ...] = ("group", "batch", "none")
values = st.one_of(st.none(), st.floats(-5, 5))
groups_of_four = st.lists(st.lists(values, min_size=4, max_size=4), min_size=1, max_size=5)


@given(groups_of_four, st.sampled_from(SCALES))
def test_advantages_sum_to_zero_in_each_group_and_only_valid_scores_have_one(raw, scale):
    found = advantages([group(*row) for row in raw], scale)
    for row, result in zip(raw, found.values, strict=True):
        assert [r is None for r in result] == [v is None for v in row]
        assert math.isclose(sum(r for r in result if r is not None), 0.0, abs_tol=1e-6)
    assert found.num_invalid == sum(v is None for row in raw for v in row)


@given(groups_of_four, st.sampled_from(SCALES))
def test_advantages_keep_the_order_of_the_scores(raw, scale):
    for row, result in zip(raw, advantages([group(*r) for r in raw], scale).values, strict=True):
        pairs = sorted((v, r) for v, r in zip(row, result, strict=True) if v is not None)
        assert all(a[1] <= b[1] for a, b in pairwise(pairs))


@given(groups_of_four, st.floats(-10, 10))
def test_a_constant_added_to_a_group_changes_nothing(raw, shift):
    moved = [[None if v is None else v + shift for v in row] for row in raw]
    one = advantages([group(*row) for row in raw], "none").values
    other = advantages([group(*row) for row in moved], "none").values
    for a, b in zip(sum(one, ()), sum(other, ()), strict=True):
        assert (a is None) == (b is None)
        assert a is None or math.isclose(a, b, abs_tol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
def test_numbers_are_those_of_trl(scale: Scale):
    raw = [[1.0, 0.0, 0.25, None], [2.0, -1.0, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3]]
    rewards = torch.tensor([[math.nan if v is None else v for v in row] for row in raw])
    mean = rewards.nanmean(dim=1, keepdim=True)
    spread = {
        "group": nanstd(rewards, dim=1)[:, None],
        "batch": nanstd(rewards),
        "none": torch.tensor(1 - 1e-4),
    }[scale]
    expected = ((rewards - mean) / (spread + 1e-4)).nan_to_num(0.0)
    found = advantages([group(*row) for row in raw], scale)
    actual = torch.tensor([[v or 0.0 for v in row] for row in found.values])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_groups_without_spread_are_counted_and_teach_nothing():
    raw = [group(0.1, 0.1, 0.1), group(1.0, None, None), group(None, None), group(0.0, 1.0)]
    found = advantages(raw, "group")
    assert found.num_flat == 3
    assert found.values[:3] == ((0.0, 0.0, 0.0), (0.0, None, None), (None, None))


def test_a_valid_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"score = nan is marked valid.*must say valid=False"):
        advantages([group(1.0, math.nan)])
