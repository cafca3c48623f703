from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import nn

from align import checkpoint
from align.optim import OptimConfig, WideAdamW, build_optimizer, lr_factor, round_at_random


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


# bf16 weights


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, dtype=torch.float32))


def wide(model: nn.Module, is_stochastic: bool, **changes: float) -> WideAdamW:
    keys = {"lr": 1e-2, "weight_decay": 0.1, **changes}
    return WideAdamW(model.parameters(), is_stochastic=is_stochastic, **keys)


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator).bfloat16()
        parameter.grad = drawn.to(parameter.dtype)


@pytest.mark.parametrize("is_stochastic", [False, True])
def test_fp32_weights_and_masters_follow_torch(is_stochastic: bool) -> None:
    """bf16 gradients are exact in fp32, so masters and fp32 weights meet torch's bit for bit."""
    model = small_net()
    model[0].bfloat16()
    exact = copy.deepcopy(model).float()
    optimizer = wide(model, is_stochastic)
    theirs = torch.optim.AdamW(exact.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(5):
        set_gradients(model, step)
        set_gradients(exact, step)
        optimizer.step()
        theirs.step()
    for ours, reference in zip(model.parameters(), exact.parameters(), strict=True):
        if ours.dtype == torch.float32:
            assert torch.equal(ours, reference)
        elif is_stochastic:
            assert "master" not in optimizer.state[ours]
            assert (ours.float() - reference).abs().max() < 0.02
        else:
            assert torch.equal(optimizer.state[ours]["master"], reference)
            assert torch.equal(ours, reference.bfloat16())


def test_small_updates_survive_stochastic_rounding_in_the_mean() -> None:
    """Steps of 1e-4 round away from 1 in bf16, whose neighbours are 0.4 and 0.8 percent off."""
    weight = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = WideAdamW([weight], lr=1e-4, is_stochastic=True)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moved = 1 - weight.float()
    # 20 steps of at most 2^-8, each with a chance: the mean's deviation is below 5e-6 * sqrt(20)
    assert float(moved.mean()) == pytest.approx(20e-4, abs=6e-5)
    assert len(weight.unique()) > 1


def test_rounding_keeps_what_bf16_holds_and_draws_by_update_and_place() -> None:
    held = torch.tensor([0.0, -1.5, 3.0e38, 1e-39]).bfloat16()
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(round_at_random(held.float(), generator), held)
    twins = nn.Module()
    twins.first, twins.second = (nn.Parameter(torch.ones(64).bfloat16()) for _ in range(2))
    optimizer, first = wide(twins, True, lr=1e-3), []
    for _ in range(2):
        for parameter in twins.parameters():
            parameter.data.fill_(1)
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        first.append(twins.first.detach().clone())
    assert not torch.equal(twins.first, twins.second)
    assert not torch.equal(*first)


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
    checkpoint.load(path, second, config="{}", accelerator=accelerator)
    for parameter in second.model.parameters():
        kept = {v.dtype for v in second.optimizer.state[parameter].values()}
        assert kept == {torch.float32}
    advance(second, range(3, 6))
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        states = (first.optimizer.state[theirs], second.optimizer.state[ours])
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
