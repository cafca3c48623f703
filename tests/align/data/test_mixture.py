from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.mixture import mix


def test_weight_is_how_often_each_row_is_seen():
    whole, half, twice = mix([10] * 3, [1.0, 0.5, 2.0], seed=1)
    assert whole == list(range(10))
    assert len(half) == 5
    assert half == sorted(set(half))
    assert twice == [*range(10), *range(10)]


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0.1, 5)), min_size=1, max_size=4))
def test_rows_of_a_source_are_taken_evenly_and_the_same_each_time(sources):
    sizes, weights = [list(each) for each in zip(*sources, strict=True)]
    taken = mix(sizes, weights, seed=3)
    assert taken == mix(sizes, weights, seed=3)
    for size, weight, each in zip(sizes, weights, taken, strict=True):
        counts = Counter(each)
        seen = [counts[index] for index in range(size)]
        assert len(each) == max(1, round(size * weight)) == sum(seen)
        assert max(seen) - min(seen) <= 1


def test_another_seed_draws_another_part():
    assert len({tuple(mix([30], [0.5], seed=seed)[0]) for seed in range(5)}) == 5


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -2.0]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]):
    with pytest.raises(ValueError, match=r"for 2 sources, expected one above 0 for each"):
        mix([1, 1], weights)


def test_an_empty_source_is_named():
    with pytest.raises(ValueError, match="source 1 has no rows"):
        mix([1, 0], [1.0, 1.0])
