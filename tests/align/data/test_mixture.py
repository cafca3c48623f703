from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.mixture import mix


def test_weight_is_how_often_each_row_is_seen():
    whole, half, twice = mix([[1] * 10] * 3, [1.0, 0.5, 2.0], seed=1)
    assert whole == list(range(10))
    assert len(half) == 5
    assert half == sorted(set(half))
    assert twice == [*range(10), *range(10)]


def test_by_rows_weights_are_shares_of_the_rows():
    taken = mix([[9] * 90, [1] * 10], [1.0, 1.0], by="rows")
    assert [len(each) for each in taken] == [50, 50]
    # Repeats are even: no row is seen twice before every row was seen once.
    assert set(Counter(taken[1]).values()) == {5}


def test_by_tokens_weights_are_shares_of_the_tokens():
    lengths = [[10] * 60, [100] * 4]
    taken = mix(lengths, [3.0, 1.0], by="tokens")
    tokens = [sum(sizes[i] for i in each) for sizes, each in zip(lengths, taken, strict=True)]
    assert tokens == [750, 200]
    assert sum(tokens) == pytest.approx(1000, abs=100)


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), min_size=1, max_size=4),
    st.sampled_from(["epochs", "rows", "tokens"]),
    st.data(),
)
def test_rows_of_a_source_are_taken_evenly_and_the_same_each_time(lengths, by, data):
    weights = [data.draw(st.floats(0.1, 5)) for _ in lengths]
    taken = mix(lengths, weights, by=by, seed=3)
    assert taken == mix(lengths, weights, by=by, seed=3)
    for sizes, each in zip(lengths, taken, strict=True):
        counts = Counter(each)
        seen = [counts[index] for index in range(len(sizes))]
        assert max(seen) - min(seen) <= 1
        assert each


def test_another_seed_draws_another_part():
    assert len({tuple(mix([[1] * 30], [0.5], seed=seed)[0]) for seed in range(5)}) == 5


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -2.0]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]):
    with pytest.raises(ValueError, match=r"for 2 sources, expected one above 0 for each"):
        mix([[1], [1]], weights)


def test_an_empty_source_is_named():
    with pytest.raises(ValueError, match="source 1 has no rows"):
        mix([[1], []], [1.0, 1.0])
