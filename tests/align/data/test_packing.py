from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.packing import pack


@given(st.lists(st.integers(1, 20)), st.integers(20, 50))
def test_packing_keeps_order_and_content_within_capacity(lengths: list[int], capacity: int):
    runs = pack(lengths, capacity)
    assert [index for run in runs for index in run] == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in run) <= capacity for run in runs)


@given(st.lists(st.integers(1, 20), min_size=1), st.integers(20, 50))
def test_a_sequence_ends_only_where_the_next_item_does_not_fit(lengths: list[int], capacity: int):
    runs = pack(lengths, capacity)
    for run, after in pairwise(runs):
        assert sum(lengths[i] for i in run) + lengths[after.start] > capacity


@pytest.mark.parametrize("length", [0, 9])
def test_an_item_that_cannot_fit_is_refused(length: int):
    with pytest.raises(ValueError, match=rf"item 1 has {length} tokens, expected 1 to sequence_to"):
        pack([3, length], 8)
