"""For all tests: one tolerance table, one measure of error, and cases that only `slow` runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

# RMS(difference) / RMS(reference): bf16 keeps 8 significant bits, fp32 24, fp64 53.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def error(actual: Tensor, reference: Tensor) -> float:
    """RMS of the difference over RMS of the reference; inf if anything is not finite."""
    actual, reference = actual.detach(), reference.detach()
    difference = (actual.double() - reference.double()).square().mean().sqrt()
    ratio = difference / reference.double().square().mean().sqrt().clamp_min(1e-30)
    return float(ratio) if torch.isfinite(ratio) else float("inf")


def assert_close(name: str, actual: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == reference.shape, f"{name}: {actual.shape} against {reference.shape}"
    found = error(actual, reference)
    assert found <= tolerance, f"{name}: relative error {found:.2e} > {tolerance:.0e}"


def slow(*cases: Any) -> list[Any]:
    """Values of a parametrisation, or tuples of several, that only the slow suite runs."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
