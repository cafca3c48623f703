from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from align.losses.reward import reward_loss
from tests.helpers import assert_close


def test_one_head_equals_trl() -> None:
    # trl 1.16 reward_trainer.py: -logsigmoid(c - r - margin) + coefficient * (c + r)^2, means
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 6, 1)
    margin = torch.rand(6)
    expected = -logsigmoid(chosen[:, 0] - rejected[:, 0] - margin).mean()
    expected = expected + 0.01 * ((chosen + rejected) ** 2).mean()
    loss = reward_loss(chosen, rejected, mask=torch.ones(6, 1), margin=margin, centring=0.01)
    assert_close("loss", loss.sum / 6, expected, 1e-6)


def test_masked_heads_get_neither_loss_nor_gradient() -> None:
    torch.manual_seed(0)
    chosen, rejected = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    mask = torch.zeros(4, 3)
    mask[:, 1] = 1
    loss = reward_loss(chosen, rejected, mask=mask, centring=0.1, heads=("a", "b", "c"))
    loss.sum.backward()
    assert torch.equal(chosen.grad != 0, mask > 0)
    alone = reward_loss(chosen[:, 1:2], rejected[:, 1:2], mask=torch.ones(4, 1), centring=0.1)
    assert_close("sum", loss.sum, alone.sum, 1e-6)
    assert float(loss.metrics["accuracy/a"][1]) == 0.0
    assert float(loss.metrics["accuracy/b"][1]) == 4.0


def test_label_smoothing_is_the_expectation_over_flipped_labels() -> None:
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 5, 1)
    mask = torch.ones(5, 1)
    right, wrong = (
        reward_loss(*pair, mask=mask).sum for pair in ((chosen, rejected), (rejected, chosen))
    )
    smooth = reward_loss(chosen, rejected, mask=mask, label_smoothing=0.1).sum
    assert_close("smooth", smooth, 0.9 * right + 0.1 * wrong, 1e-6)
