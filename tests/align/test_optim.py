from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import nn

from align import checkpoint
from align.optim import OptimConfig, build_optimizer, lr_factor
from tests.align.test_wide_adamw import set_gradients, small_net


def rates(config: OptimConfig, num_steps: int) -> list[float]:
    """The learning rates that updates really used."""
    model = nn.Linear(2, 2)
    optimizer, scheduler = build_optimizer(model, config, num_steps)
    used = []
    for _ in range(num_steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_ends_at_min_lr_on_the_last_step(schedule: str) -> None:
    config = OptimConfig(lr=1e-3, min_lr=1e-4, schedule=schedule, warmup_steps=2)
    used = rates(config, 10)
    assert used[:3] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert used[-1] == pytest.approx(1e-4)
    assert used[2:] == sorted(used[2:], reverse=True)


def test_cosine_midpoint_and_constant() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0)
    assert lr_factor(config, 50, 101) == pytest.approx(0.5)
    assert lr_factor(config, 25, 101) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rates(OptimConfig(lr=3e-6, min_lr=3e-6, schedule="constant"), 4) == [3e-6] * 4


def test_warmup_share_rounds_up() -> None:
    used = rates(OptimConfig(lr=1.0, schedule="constant", warmup_share=0.25), 10)
    assert used[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_only_trained_matrices_decay() -> None:
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(3, 2),
            "proj": nn.Linear(2, 2),
            "norm": nn.LayerNorm(2),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
        }
    )
    optimizer, _ = build_optimizer(model, OptimConfig(weight_decay=0.1), 1)
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert [id(p) for p in decayed["params"]] == [id(model["proj"].weight)]
    assert len(spared["params"]) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lr": 1e-5, "min_lr": 1e-4},
            r"optim\.min_lr = 0\.0001, expected at most optim\.lr = 1e-05",
        ),
        (
            {"warmup_steps": 3, "warmup_share": 0.1},
            r"optim\.warmup_steps = 3 and optim\.warmup_share = 0\.1 both given",
        ),
        ({"betas": (0.9, 1.0)}, r"optim\.betas = \(0\.9, 1\.0\), expected each in \[0, 1\)"),
    ],
)
def test_config_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimConfig(**changes)


def test_build_refuses() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        build_optimizer(frozen, OptimConfig(), 1)
    with pytest.raises(ValueError, match=r"optim\.warmup_steps = 5, expected fewer than the 5"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(warmup_steps=5), 5)


def test_clip_of_zero_is_allowed_and_negative_is_not() -> None:
    assert OptimConfig(clip_norm=0).clip_norm == 0
    with pytest.raises(ValidationError, match="clip_norm"):
        OptimConfig(clip_norm=-1)


@pytest.mark.parametrize("weights", ["bf16_master", "bf16_stochastic"])
def test_resumed_bf16_weights_are_bit_identical(tmp_path: Path, weights: str) -> None:
    accelerator = Accelerator(cpu=True)

    def build(seed: int) -> checkpoint.Trained:
        model = small_net(seed)
        model[0].bfloat16()
        config = OptimConfig(lr=1e-2, weight_decay=0.1, weights=weights)
        return checkpoint.Trained(model, *build_optimizer(model, config, 10))

    def advance(made: checkpoint.Trained, steps: range) -> None:
        for step in steps:
            set_gradients(made.model, step)
            made.optimizer.step()
            made.scheduler.step()

    first, second = build(0), build(1)
    advance(first, range(3))
    progress = checkpoint.Progress(step=3, course={}, state={})
    path = checkpoint.save(tmp_path, first, progress, config="{}", keep=1, accelerator=accelerator)
    advance(first, range(3, 6))
    checkpoint.load(path, second, config="{}")
    for parameter in second.model.parameters():
        kept = {v.dtype for v in second.optimizer.state[parameter].values()}
        assert kept == {torch.float32}
    advance(second, range(3, 6))
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        states = (first.optimizer.state[theirs], second.optimizer.state[ours])
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
