"""Chances that are frequencies: fitted, tested on pairs they have not seen, told by slice."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reward.calibration import (
    Calibration,
    by_slice,
    cross_fitted,
    fit,
    reliability,
)
from reward.hierarchy import sigmoid

METHODS = ("temperature", "isotonic")


def drawn(count: int, temperature: float, seed: int = 0) -> list[float]:
    """Leads whose true chance is sigmoid(lead / temperature)."""
    rng = random.Random(seed)
    sizes = [rng.uniform(0, 6) for _ in range(count)]
    return [s if rng.random() < sigmoid(s / temperature) else -s for s in sizes]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_temperature_is_found_again(temperature):
    assert fit(drawn(20_000, temperature)).temperature == pytest.approx(temperature, rel=0.08)


@pytest.mark.parametrize("method", METHODS)
def test_a_fit_makes_an_overconfident_model_honest(method):
    leads = drawn(4000, 5.0)
    raw = reliability([sigmoid(lead) for lead in leads])
    fitted = reliability(cross_fitted(leads, method))
    assert raw.ece > 0.15
    assert fitted.ece < 0.03
    assert fitted.accuracy == pytest.approx(raw.accuracy, abs=1e-3)


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=40),
    st.sampled_from(METHODS),
    st.floats(-50, 50),
    st.floats(0, 20),
)
def test_chances_rise_with_the_lead_and_mirror(leads, method, lead, more):
    fitted = fit(leads, method)
    chance = fitted.probability(lead)
    assert 0 <= chance <= 1
    assert fitted.probability(lead + more) >= chance - 1e-12
    if lead:
        assert fitted.probability(-lead) == pytest.approx(1 - chance)


@pytest.mark.parametrize("method", METHODS)
def test_no_model_is_held_to_be_infallible(method):
    assert fit([3.0] * 20, method).probability(3.0) < 0.999
    assert fit([3.0] * 20, method).probability(3.0) > 0.9


def test_luck_has_no_confidence():
    leads = [1.0, -1.0] * 50
    assert fit(leads).probability(1.0) == pytest.approx(0.5, abs=0.01)
    assert fit(leads, "isotonic").probability(1.0) == pytest.approx(0.5)


def test_the_error_of_calibration_is_the_gap_by_bins():
    # 0.9 sure and right in 2 of 4; 0.6 sure and right in 2 of 2
    told = reliability([0.9, 0.9, 0.1, 0.1, 0.6, 0.6])
    assert told.ece == pytest.approx((4 * 0.4 + 2 * 0.4) / 6)
    assert told.accuracy == pytest.approx(4 / 6)
    assert told.accuracy_error == pytest.approx(math.sqrt(4 / 6 * 2 / 6 / 6))
    assert told.confidence == pytest.approx(0.8)


def test_slices_are_measured_apart():
    found = by_slice([0.9, 0.9, 0.1], ["x", "x", "y"])
    assert (found["x"].accuracy, found["y"].accuracy) == (1.0, 0.0)


def test_a_map_survives_its_file():
    fitted = fit(drawn(200, 2.0), "isotonic")
    again = Calibration.model_validate_json(fitted.model_dump_json())
    assert again == fitted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"leads": (1.0,)}, "must be rising"),
        ({"leads": (2.0, 1.0), "chances": (0.5, 0.6)}, "must be rising"),
        ({"method": "isotonic"}, "isotonic without leads"),
    ],
)
def test_a_map_that_does_not_rise_is_an_error(given, message):
    with pytest.raises(ValidationError, match=message):
        Calibration(num_pairs=1, **given)


def test_nothing_to_fit_is_an_error():
    with pytest.raises(ValueError, match="no held-out pairs"):
        fit([])
    with pytest.raises(ValueError, match="reliability: no pairs"):
        reliability([])
    with pytest.raises(ValueError, match="3 held-out pairs, expected 5 or more"):
        cross_fitted([1.0] * 3)
