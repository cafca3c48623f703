from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from align.losses.dpo import chosen_nll, dpo_loss, sequence_logprobs
from tests.helpers import assert_close


def test_loss_of_a_policy_at_its_reference_is_ln_2_to_the_last_bit() -> None:
    torch.manual_seed(0)
    at = -100 * torch.rand(8)
    loss = dpo_loss(at.requires_grad_(), at.detach(), beta=0.3, label_smoothing=0.2)
    assert loss.sum.item() == torch.tensor(4 * math.log(2)).item()
    assert float(loss.metrics["rewards/accuracies"][0]) == 0.0


def test_equals_trl_sigmoid() -> None:
    # trl 1.16 dpo_trainer.py: -logsigmoid(beta * (chosen_logratios - rejected_logratios))
    torch.manual_seed(0)
    policy, reference = -20 * torch.rand(2, 10)
    ratios = policy - reference
    expected = -logsigmoid(0.1 * (ratios[0::2] - ratios[1::2]))
    loss = dpo_loss(policy, reference, beta=0.1)
    assert_close("sum", loss.sum, expected.sum(), 1e-6)
    margin, count = loss.metrics["rewards/margins"]
    assert_close("margin", margin / count, 0.1 * (ratios[0::2] - ratios[1::2]).mean(), 1e-5)
    right = (ratios[0::2] > ratios[1::2]).float().sum()
    assert float(loss.metrics["rewards/accuracies"][0]) == float(right)


def test_label_smoothing_is_the_expectation_over_flipped_labels() -> None:
    torch.manual_seed(0)
    policy, reference = -20 * torch.rand(2, 6).double()
    flip = torch.tensor([1, 0, 3, 2, 5, 4])
    right = dpo_loss(policy, reference, beta=0.1).sum
    wrong = dpo_loss(policy[flip], reference[flip], beta=0.1).sum
    smooth = dpo_loss(policy, reference, beta=0.1, label_smoothing=0.25).sum
    assert_close("smooth", smooth, 0.75 * right + 0.25 * wrong, 1e-6)


@pytest.mark.parametrize("lengths", [(5,), (1, 4), (2, 1, 2)])
def test_sequence_sums_and_their_gradient(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logprobs = torch.randn(5, requires_grad=True)
    weights = torch.tensor([1.0, 0, 1, 2, 1])
    sums = sequence_logprobs(logprobs, weights, lengths)
    parts = (logprobs * weights).split(lengths)
    assert_close("sums", sums, torch.stack([part.sum() for part in parts]).double(), 1e-6)
    scale = torch.arange(1.0, len(lengths) + 1)
    (sums * scale).sum().backward()
    expected = weights * torch.repeat_interleave(scale, torch.tensor(lengths))
    assert torch.equal(logprobs.grad, expected)


def test_small_difference_of_long_answers_survives() -> None:
    # fp32 sums of 200k tokens are near 4e5, where neighbours are 0.03 apart.
    torch.manual_seed(0)
    logprobs = -4 * torch.rand(200_000)
    nearer = logprobs.clone()
    nearer[17] += 1e-3
    sums = [sequence_logprobs(x, torch.ones(200_000), (200_000,)) for x in (nearer, logprobs)]
    assert abs(float(sums[0] - sums[1]) - float(nearer[17] - logprobs[17])) < 1e-9


def test_chosen_nll_is_a_mean_per_answer() -> None:
    logprobs = torch.tensor([-9.0, -1, -3, -9, -5, -9])
    weights = torch.tensor([0.0, 1, 1, 1, 1, 1])
    # sequences: chosen (3), rejected (1), chosen (1), rejected (1)
    assert chosen_nll(logprobs, weights, (3, 1, 1, 1)).item() == 2.0 + 5.0
