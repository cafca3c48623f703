from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from align.losses.lm import lm_loss
from tests.helpers import assert_close


def test_equals_cross_entropy_over_trained_tokens() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 11)
    targets = torch.randint(0, 11, (7,))
    weights = torch.tensor([0.0, 1, 1, 0, 1, 0, 1])
    logprobs = logits.log_softmax(-1)[torch.arange(7), targets]
    labels = targets.where(weights > 0, -100)
    loss = lm_loss(logprobs, weights)
    total, count = loss.metrics["nll"]
    assert_close("sum", loss.sum, cross_entropy(logits, labels, reduction="sum"), 1e-6)
    assert (float(total), float(count)) == (float(loss.sum), 4.0)


def test_untrained_token_of_probability_zero_gives_no_nan() -> None:
    logprobs = torch.tensor([-torch.inf, -1.0], requires_grad=True)
    loss = lm_loss(logprobs, torch.tensor([0.0, 2.0]))
    loss.sum.backward()
    assert loss.sum.item() == 2.0
    assert logprobs.grad.tolist() == [0.0, -2.0]
