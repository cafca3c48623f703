from __future__ import annotations

import doctest
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from align import loop, peaks
from align.loop import TrainConfig, train
from align.lora import LoraConfig, apply_lora
from align.peaks import named_peak, peak_operations
from align.throughput import trained_operations
from model.config import count_operations
from reward.hierarchy import HIERARCHY
from reward.model import RewardModel
from tests.align import small
from tests.align.test_loop import Course, data, lines


def test_examples_run() -> None:
    assert doctest.testmod(peaks).failed == 0


def test_peaks_by_name() -> None:
    assert named_peak("NVIDIA H100 PCIe") < named_peak("NVIDIA H100 80GB HBM3")
    assert named_peak("NVIDIA H200") == named_peak("NVIDIA H100 80GB HBM3")
    assert math.isnan(named_peak("Some GPU"))
    assert math.isnan(peak_operations(torch.device("cpu")))


def test_what_is_trained_decides_what_counts() -> None:
    policy, lengths = small.model(), (7, 3)
    found = count_operations(policy.config, lengths)
    trunk = count_operations(policy.config, lengths, has_head=False)
    assert found.weights - trunk.weights == 2 * 10 * small.VOCAB * 32
    assert trained_operations(policy)(lengths) == found.training
    assert trained_operations(RewardModel(policy.model, HIERARCHY))(lengths) == trunk.training
    adapted = apply_lora(small.model(), LoraConfig(rank=2), seed=0)
    assert trained_operations(adapted)(lengths) == 2 * found.weights + 3 * found.mixing
    assert trained_operations(nn.Linear(2, 2))(lengths) == 0


def test_share_of_the_peak_is_logged_where_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, course = small.model(), Course(data(batch_items=12))
    bf16 = TrainConfig(precision="bf16")
    monkeypatch.setattr(loop, "peak_operations", lambda device: 1e12)
    train(course, model, config=bf16, job=small.job(tmp_path / "known"))
    (line,) = lines(tmp_path / "known")
    batches = course.data.batches(0)
    done = sum(count_operations(model.config, b.packed.lengths).training for b in batches)
    assert line["mfu"] == pytest.approx(done / line["seconds"] / 1e12)
    train(course, model, config=TrainConfig(), job=small.job(tmp_path / "fp32"))
    assert "mfu" not in lines(tmp_path / "fp32")[0]
