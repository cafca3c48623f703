"""One tolerance table and one measure of error for all tests."""

from __future__ import annotations

import torch
from torch import Tensor

# RMS(difference) / RMS(reference): bf16 keeps 8 significant bits, fp32 24, fp64 53.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def error(actual: Tensor, reference: Tensor) -> float:
    """RMS of the difference over RMS of the reference; inf if anything is not finite."""
    difference = (actual.double() - reference.double()).square().mean().sqrt()
    ratio = difference / reference.double().square().mean().sqrt().clamp_min(1e-30)
    return float(ratio) if torch.isfinite(ratio) else float("inf")


def assert_close(name: str, actual: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == reference.shape, f"{name}: {actual.shape} against {reference.shape}"
    found = error(actual, reference)
    assert found <= tolerance, f"{name}: relative error {found:.2e} > {tolerance:.0e}"
