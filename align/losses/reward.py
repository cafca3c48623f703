"""Bradley-Terry: the chosen answer should score higher, head by head.

    loss = -(1 - e) log sigmoid(d - margin) - e log sigmoid(-(d - margin)) + c (s+ + s-)^2
    d = s+ - s-

Scores are only compared, so their zero is free; c pulls it to the middle of each pair.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from align.losses.types import Loss


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    mask: Tensor,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
    heads: tuple[str, ...] = (),
    aux: Tensor | None = None,
) -> Loss:
    """Bradley-Terry loss, summed over pairs and over the heads that each pair labels.

    Args:
        chosen, rejected: [P, N] fp32, scores of N heads.
        mask: [P, N], 1 where the pair's label speaks about the head, else 0; its sum over all
            processes and microbatches is the denominator.
        margin: [P] fp32, by how much chosen should lead; None means 0.
        label_smoothing: in [0, 0.5), probability that a label is wrong.
        centring: >= 0, weight of the squared sum of a pair's scores.
        heads: names for accuracy metrics per head; () gives only the total.
        aux: the model's own routing loss, handed on.

    Returns: masked sum; metrics accuracy, margin and accuracy/<head>.

    Source: TRL 1.16 RewardTrainer (`margin`, `center_rewards_coefficient`) for one head.

    Example:
        >>> import torch
        >>> scores = torch.zeros(1, 1)
        >>> round(reward_loss(scores, scores, mask=torch.ones(1, 1)).sum.item(), 6)
        0.693147
    """
    lead = chosen - rejected
    wanted = lead if margin is None else lead - margin[:, None]
    losses = -(1 - label_smoothing) * logsigmoid(wanted) - label_smoothing * logsigmoid(-wanted)
    losses = losses + centring * (chosen + rejected).square()
    right = (lead > 0) * mask
    metrics = {
        "accuracy": (right.sum(), mask.sum()),
        "margin": ((lead.detach() * mask).sum(), mask.sum()),
    }
    for index, head in enumerate(heads):
        metrics[f"accuracy/{head}"] = (right[:, index].sum(), mask[:, index].sum())
    return Loss(sum=(losses * mask).sum(), aux=aux, metrics=metrics)
