from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.batch import Example, Pair
from align.data.loader import PackedData


def example(length: int, name: int) -> Example:
    return Example(tuple(range(length)), (0.0, *(1.0,) * (length - 1)), f"row {name}")


def examples(lengths: list[int]) -> list[Example]:
    return [example(length, name) for name, length in enumerate(lengths)]


def places(data: PackedData, step: int, world: int = 1) -> list[str]:
    return [
        place
        for rank in range(world)
        for batch in data.batches(step, rank, world)
        for place in batch.places
    ]


LENGTHS = st.lists(st.integers(2, 12), min_size=1, max_size=30)


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_every_row_is_seen_once_per_epoch(
    lengths: list[int], batch: int, micro: int, epochs: int, seed: int
):
    data = PackedData(
        examples(lengths),
        sequence_tokens=16,
        batch_sequences=batch,
        micro_sequences=micro,
        epochs=epochs,
        seed=seed,
    )
    seen = Counter(place for step in range(data.num_steps) for place in places(data, step))
    assert seen == {f"row {name}": epochs for name in range(len(lengths))}


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(1, 4), st.integers(2, 5), st.integers(0, 3), st.booleans())
def test_ranks_together_see_the_same_step_at_every_world_size(
    lengths: list[int], batch: int, world: int, seed: int, in_items: bool
):
    data = PackedData(
        examples(lengths),
        sequence_tokens=16,
        batch_sequences=batch,
        batch_items=batch if in_items else 0,
        seed=seed,
    )
    for step in range(data.num_steps):
        assert sorted(places(data, step, world)) == sorted(places(data, step))


def test_a_step_is_a_function_of_seed_and_index_alone():
    rows = examples([5, 3, 8, 2, 9, 4, 6])
    first, second = (PackedData(rows, sequence_tokens=16, epochs=3, seed=7) for _ in range(2))
    # Asked from the end first: nothing may be remembered between steps.
    later = [places(first, step) for step in reversed(range(first.num_steps))][::-1]
    assert later == [places(second, step) for step in range(second.num_steps)]


def test_another_seed_and_another_epoch_give_another_order():
    rows = examples([4] * 20)
    orders = []
    for seed in (0, 1):
        data = PackedData(rows, sequence_tokens=4, batch_sequences=20, epochs=2, seed=seed)
        orders += [tuple(places(data, step)) for step in range(2)]
    assert len(set(orders)) == 4


def test_order_is_kept_without_shuffle():
    data = PackedData(examples([4, 5, 6, 7]), sequence_tokens=10, epochs=2, shuffle=False)
    seen = [place for step in range(data.num_steps) for place in places(data, step)]
    assert seen == ["row 0", "row 1", "row 2", "row 3"] * 2


def test_last_partial_step_is_kept():
    data = PackedData(examples([8] * 5), sequence_tokens=8, batch_sequences=2, shuffle=False)
    assert [len(places(data, step)) for step in range(data.num_steps)] == [2, 2, 1]


def test_max_steps_goes_through_as_many_epochs_as_it_needs():
    data = PackedData(examples([8] * 3), sequence_tokens=8, batch_sequences=2, max_steps=5)
    assert data.num_steps == 5
    assert [len(places(data, step)) for step in range(5)] == [2, 1, 2, 1, 2]


def test_batch_items_counts_rows_whatever_their_length():
    data = PackedData(examples([2, 12, 2, 12, 12]), sequence_tokens=16, batch_items=2, seed=3)
    assert [len(places(data, step)) for step in range(data.num_steps)] == [2, 2, 1]


def test_micro_sequences_changes_the_split_but_not_the_step():
    rows = examples([8] * 6)
    one, three = (
        PackedData(rows, sequence_tokens=8, batch_sequences=6, micro_sequences=m, shuffle=False)
        for m in (1, 3)
    )
    assert [batch.places for batch in three.batches(0)] == [
        ("row 0", "row 1", "row 2"),
        ("row 3", "row 4", "row 5"),
    ]
    assert places(one, 0) == places(three, 0)


def test_a_rank_without_work_gets_no_batch():
    data = PackedData(examples([4]), sequence_tokens=4)
    assert len(data.batches(0, rank=0, world=2)) == 1
    assert data.batches(0, rank=1, world=2) == ()


def test_a_pair_is_never_split():
    pairs = [Pair(example(4, 2 * i), example(5, 2 * i + 1)) for i in range(5)]
    data = PackedData(pairs, sequence_tokens=20, batch_sequences=2, shuffle=False)
    assert data.num_tokens == 45
    for step in range(data.num_steps):
        for batch in data.batches(step):
            assert batch.packed.lengths == (4, 5) * len(batch.pairs)
            assert batch.places == tuple(
                place for pair in batch.pairs for place in (pair.chosen.place, pair.rejected.place)
            )


def test_a_pair_longer_than_a_sequence_is_refused():
    pair = Pair(example(6, 0), example(6, 1))
    with pytest.raises(ValueError, match="row 0: 12 tokens, longer than sequence_tokens = 10"):
        PackedData([pair], sequence_tokens=10)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows are left to train on"):
        PackedData([], sequence_tokens=8)


@pytest.mark.parametrize(
    "name", ["batch_sequences", "batch_items", "micro_sequences", "epochs", "max_steps"]
)
def test_numbers_out_of_range_are_named(name: str):
    with pytest.raises(ValueError, match=rf"{name} = -1, expected >= "):
        PackedData(examples([3]), sequence_tokens=8, **{name: -1})


def test_sequence_tokens_out_of_range_is_named():
    with pytest.raises(ValueError, match="sequence_tokens = 1, expected >= 2"):
        PackedData(examples([3]), sequence_tokens=1)


def test_a_step_that_is_not_there_is_refused():
    data = PackedData(examples([3]), sequence_tokens=8)
    with pytest.raises(IndexError, match="step 1, expected 0 to 0"):
        data.batches(1)
