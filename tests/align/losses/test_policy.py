from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.losses.policy import OBJECTIVES, PolicyLossConfig, policy_count, policy_loss
from tests.helpers import assert_close

LENGTHS = (5, 3, 7)
NUM_TOKENS = sum(LENGTHS)


def inputs(seed: int = 0, spread: float = 0.5) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    logprobs = -2 * torch.rand(NUM_TOKENS)
    return {
        "logprobs": logprobs.requires_grad_(),
        "behaviour": logprobs.detach() + spread * torch.randn(NUM_TOKENS),
        "advantages": torch.randn(NUM_TOKENS),
        "weights": (torch.rand(NUM_TOKENS) > 0.3).float(),
        "reference": logprobs.detach() + 0.1 * torch.randn(NUM_TOKENS),
    }


def oracle(config: PolicyLossConfig, given: dict[str, Tensor]) -> Tensor:
    """GRPOTrainer._compute_loss of trl 1.16 on padded rows, one accumulation step."""

    def rows(values: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values.split(LENGTHS), batch_first=True)

    logps, old, adv, mask, ref = (
        rows(given[k]) for k in ("logprobs", "behaviour", "advantages", "weights", "reference")
    )
    coef_1 = torch.exp(logps - old)
    if config.objective == "cispo":
        loss = -coef_1.clamp(max=config.is_max).detach() * adv * logps
    else:
        coef_2 = coef_1.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
        if config.ratio_cap:
            coef_1 = coef_1.clamp(max=config.ratio_cap)
        loss = -torch.min(coef_1 * adv, coef_2 * adv)
    if config.beta:
        loss = loss + config.beta * (torch.exp(ref - logps) - (ref - logps) - 1)
    if config.objective == "grpo":
        return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if config.objective == "dr_grpo":
        return (loss * mask).sum() / (len(LENGTHS) * config.max_response_tokens)
    return (loss * mask).sum() / mask.sum().clamp(min=1.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("ratio_cap", [0.0, 1.5])
def test_loss_and_gradient_equal_trl(objective: str, beta: float, ratio_cap: float) -> None:
    config = PolicyLossConfig(
        objective=objective,
        beta=beta,
        ratio_cap=ratio_cap,
        epsilon_high=0.3,
        is_max=1.4,
        max_response_tokens=9,
    )
    given = inputs()
    loss = policy_loss(**given, lengths=LENGTHS, config=config)
    mean = loss.sum / policy_count(given["weights"], LENGTHS, config)
    expected = oracle(config, given)
    assert_close("loss", mean, expected, 1e-6)
    ours, theirs = (torch.autograd.grad(x, given["logprobs"])[0] for x in (mean, expected))
    assert_close("gradient", ours, theirs, 1e-6)


def test_metrics_are_of_raw_ratios_on_trained_tokens() -> None:
    given = inputs()
    loss = policy_loss(
        **given, lengths=LENGTHS, config=PolicyLossConfig(objective="cispo", is_max=1.1)
    )
    ratio = (given["logprobs"] - given["behaviour"]).exp()[given["weights"] > 0]
    total, count = loss.metrics["ratio/mean"]
    assert_close("mean", total / count, ratio.mean(), 1e-6)
    assert_close("max", loss.maxima["ratio/max"], ratio.max(), 1e-6)
    clipped, count = loss.metrics["ratio/clipped"]
    assert float(clipped) == float((ratio > 1.1).sum())


def test_on_policy_ratio_is_exactly_one() -> None:
    given = inputs()
    given["behaviour"] = given["logprobs"].detach()
    loss = policy_loss(**given, lengths=LENGTHS, config=PolicyLossConfig())
    total, count = loss.metrics["ratio/mean"]
    assert float(total) == float(count)
    assert float(loss.maxima["ratio/max"]) == 1.0
    assert float(loss.metrics["ratio/clipped"][0]) == 0.0


def test_drop_ratio_removes_bad_tokens_that_grew_likely() -> None:
    given = inputs(spread=1.5)
    config = PolicyLossConfig(objective="dapo", drop_ratio=2.0)
    loss = policy_loss(**given, lengths=LENGTHS, config=config)
    gradient = torch.autograd.grad(loss.sum, given["logprobs"])[0]
    ratio = (given["logprobs"] - given["behaviour"]).exp()
    dropped = (given["advantages"] < 0) & (ratio > 2) & (given["weights"] > 0)
    assert dropped.any()
    assert (gradient[dropped] == 0).all()
    kept = (given["advantages"] < 0) & (ratio > 1) & (ratio <= 2) & (given["weights"] > 0)
    assert (gradient[kept] > 0).all()
    assert float(loss.metrics["ratio/dropped"][0]) == float(dropped.sum())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_huge_ratio_gives_a_finite_gradient(objective: str) -> None:
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss = policy_loss(
        logprobs,
        behaviour=torch.tensor([-200.0, -200.0]),
        advantages=torch.tensor([1.0, -1e-9]),
        weights=torch.ones(2),
        lengths=(2,),
        config=PolicyLossConfig(objective=objective),
    )
    loss.sum.backward()
    assert torch.isfinite(logprobs.grad).all()


def test_untrained_tokens_do_not_matter() -> None:
    given = inputs()
    config = PolicyLossConfig(beta=0.1)
    before = policy_loss(**given, lengths=LENGTHS, config=config).sum
    out = given["weights"] == 0
    given["behaviour"] = given["behaviour"].where(~out, -torch.inf)
    given["reference"] = given["reference"].where(~out, torch.nan)
    after = policy_loss(**given, lengths=LENGTHS, config=config).sum
    assert float(before) == float(after)


def test_reference_is_needed_for_beta() -> None:
    given = inputs()
    given.pop("reference")
    with pytest.raises(ValueError, match=r"beta = 0\.1 needs reference log-probabilities"):
        policy_loss(**given, lengths=LENGTHS, config=PolicyLossConfig(beta=0.1))
