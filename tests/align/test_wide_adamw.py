from __future__ import annotations

import copy
import doctest

import pytest
import torch
from torch import nn

from align import wide_adamw
from align.wide_adamw import WideAdamW, round_at_random


def test_examples_run() -> None:
    assert doctest.testmod(wide_adamw).failed == 0


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
        parameter.grad = drawn.to(parameter)


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
    assert float(moved.detach().mean()) == pytest.approx(20e-4, abs=6e-5)
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


@pytest.mark.gpu
@pytest.mark.parametrize("is_stochastic", [False, True])
def test_a_step_on_cuda_waits_for_nothing(is_stochastic: bool) -> None:
    """And gives what a CPU gives, up to the last bit of fp32 and its rounding."""
    model = small_net()
    model[0].bfloat16()
    there = copy.deepcopy(model).cuda()
    optimizers = [wide(m, is_stochastic) for m in (model, there)]
    for step in range(3):
        for each in (model, there):
            set_gradients(each, step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizers[1].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizers[0].step()
    for ours, theirs in zip(model.parameters(), there.parameters(), strict=True):
        bound = 1e-5 if ours.dtype == torch.float32 else 2e-2
        assert torch.allclose(theirs.float().cpu(), ours.float(), rtol=bound, atol=bound)
