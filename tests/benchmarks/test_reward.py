"""The check of values in benchmarks/reward.py: what passes, and that a wrong model does not."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.reward import Error, check

PEER = {"transformers, 1 a batch": Error(0.1, 0.4)}


def test_errors_are_relative_to_the_truths_own_size():
    truth = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    error = Error.of(truth + torch.tensor([[0.0, 0.0], [0.0, 1.0]]), truth)
    assert error.rms == pytest.approx(0.2)
    assert error.worst == pytest.approx(0.25)


def test_bf16_may_be_as_far_from_fp32_as_the_peer():
    check({"ours, 512 tokens": Error(0.12, 0.9), **PEER}, "bf16")
    check(
        {"ours, 512 tokens": Error(1e-6, 9e-4), **PEER, "transformers, 1 a batch": Error(0, 0)},
        "fp32",
    )


@pytest.mark.parametrize(
    ("dtype", "error"),
    [
        ("bf16", Error(0.2, 0.4)),
        ("bf16", Error(0.1, 1.3)),
        ("bf16", Error(math.nan, math.nan)),
        ("fp32", Error(1e-5, 2e-3)),
        ("fp32", Error(math.nan, math.nan)),
    ],
)
def test_another_models_values_end_the_benchmark(dtype: str, error: Error):
    with pytest.raises(RuntimeError, match=r"ours, 512 tokens: .*expected at most"):
        check({"ours, 512 tokens": error, **PEER}, dtype)


def test_bf16_without_a_peer_is_no_check():
    with pytest.raises(RuntimeError, match="no run of the peer's ended"):
        check({"ours, 512 tokens": Error(0.0, 0.0)}, "bf16")
