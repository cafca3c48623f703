"""Order and pacing: easy before hard, leaves before the whole, every pair equally often."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reward.curriculum import (
    CurriculumConfig,
    PairFacts,
    difficulty,
    open_share,
    order,
    rank,
)


def facts(
    row: float = 0.5, *, signal: str = "style", margin: float = 0.0, lengths=(5, 5), model=None
):
    phase = 2 if signal == "overall" else 0
    return PairFacts("a.jsonl:1", signal, row, margin, *lengths, model, phase)


def test_difficulty_is_bounded_and_follows_what_is_known():
    config = CurriculumConfig(model_weight=1.0)
    assert difficulty(facts(0.9), config) > difficulty(facts(0.1), config)
    assert difficulty(facts(margin=0.1), config) > difficulty(facts(margin=3.0), config)
    assert difficulty(facts(lengths=(5, 5)), config) > difficulty(facts(lengths=(5, 50)), config)
    assert difficulty(facts(model=-2.0), config) > difficulty(facts(model=2.0), config)
    assert difficulty(facts(0.0, margin=1e9, lengths=(1, 10**9)), config) < 1e-9
    assert difficulty(facts(1.0), config) == pytest.approx(1)


@given(st.floats(0.01, 1), st.floats(0.05, 1), st.sampled_from(["linear", "root"]))
def test_the_open_share_grows_from_start_to_all_and_never_lags_behind_progress(start, full, pacing):
    config = CurriculumConfig(pacing=pacing, start_share=start, full_at=full)
    shares = [open_share(config, step / 50) for step in range(51)]
    assert shares[0] == pytest.approx(start)
    assert shares[-1] == pytest.approx(1)
    assert shares == sorted(shares)
    assert all(share >= step / 50 - 1e-12 for step, share in enumerate(shares))


@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.floats(0.01, 1),
    st.sampled_from(["linear", "root"]),
    st.integers(0, 9),
)
def test_every_pair_is_drawn_once_per_epoch_of_draws(size, epochs, start, pacing, seed):
    rows = [facts(n / size) for n in range(size)]
    config = CurriculumConfig(pacing=pacing, start_share=start, full_at=1.0)
    drawn = order(rows, config, epochs=epochs, seed=seed)
    assert sorted(drawn) == sorted(list(range(size)) * epochs)
    assert drawn == order(rows, config, epochs=epochs, seed=seed)


def test_only_open_pairs_are_drawn():
    rows = [facts(n / 100) for n in range(100)]
    config = CurriculumConfig(pacing="linear", start_share=0.1, full_at=1.0)
    drawn = order(rows, config, epochs=2, seed=3)
    for place, index in enumerate(drawn):
        assert index <= 100 * open_share(config, place / 200)
    assert order(rows, config, epochs=2, seed=4) != drawn


def test_leaves_come_before_the_whole_and_signals_are_spread():
    rows = [facts(n / 10, signal="overall") for n in range(10)]
    rows += [facts(n / 100, signal="style") for n in range(10)]
    rows += [facts(0.5 + n / 100, signal="correctness") for n in range(10)]
    random.Random(0).shuffle(rows)
    ranked = [rows[index] for index in rank(rows, CurriculumConfig())]
    assert {row.signal for row in ranked[20:]} == {"overall"}
    # Quantiles within a signal: the harder signal does not wait for the easier one.
    assert {row.signal for row in ranked[:2]} == {"style", "correctness"}
    mixed = rank(rows, CurriculumConfig(leaves_first=False))
    assert {rows[index].signal for index in mixed[:3]} == {"style", "correctness", "overall"}


def test_nothing_to_order_is_an_error():
    with pytest.raises(ValueError, match="0 pairs in 1 epochs, expected 1 or more of both"):
        order([], CurriculumConfig(), epochs=1, seed=0)


def test_weights_that_measure_nothing_are_an_error():
    with pytest.raises(ValidationError, match="row_weight and length_weight are 0"):
        CurriculumConfig(row_weight=0.0, length_weight=0.0)


def test_three_phases_come_in_order():
    rows = [
        PairFacts("a:1", label, 0.5, 0.0, 5, 5, phase=phase)
        for phase, label in ((2, "overall"), (1, "helpfulness"), (0, "style"))
        for _ in range(3)
    ]
    ranked = [rows[index].phase for index in rank(rows, CurriculumConfig())]
    assert ranked == [0] * 3 + [1] * 3 + [2] * 3


def test_a_source_named_hard_is_hard():
    config = CurriculumConfig(source_weight=2.0, sources={"web": 1.0, "book": 0.0})
    web, book, other = (
        PairFacts("a:1", "style", 0.5, 0.0, 5, 5, source=name) for name in ("web", "book", "")
    )
    assert difficulty(web, config) > difficulty(other, config) > difficulty(book, config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pacing": "competence"}, "competence with refreshes = 0"),
        ({"refreshes": 2}, "nothing uses what they measure"),
        ({"source_weight": 1.0}, "give both or none"),
        ({"source_weight": 1.0, "sources": {"a": 2.0}}, "expected difficulties from 0 to 1"),
    ],
)
def test_keys_that_do_not_fit_together_are_errors(given, message):
    with pytest.raises(ValidationError, match=message):
        CurriculumConfig(**given)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1))
def test_competence_opens_more_and_never_lags_behind_progress(progress, able, start):
    config = CurriculumConfig(pacing="competence", refreshes=1, start_share=start)
    share = open_share(config, progress, able)
    assert share >= max(progress, start) - 1e-12
    assert open_share(config, progress, 0.0) <= share <= 1 + 1e-12
