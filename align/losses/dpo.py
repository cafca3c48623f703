"""Direct preference optimisation, sigmoid form (Rafailov et al. 2023, eq. 7).

    loss = -(1 - e) log sigmoid(beta * d) - e log sigmoid(-beta * d)
    d = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))

with label smoothing e in its conservative form (the labels are wrong with probability e).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.losses.types import Loss
from model.packed import sent


def sequence_logprobs(logprobs: Tensor, weights: Tensor, lengths: Sequence[int]) -> Tensor:
    """[S] fp64: weighted sum of each sequence's log-probabilities, differentiable.

    Args:
        logprobs, weights: [T] fp32, aligned with the targets of a packed batch.
        lengths: tokens of each sequence, sum T.

    Example:
        >>> sequence_logprobs(torch.tensor([-1.0, -2.0, -4.0]), torch.ones(3), (2, 1)).tolist()
        [-3.0, -4.0]
    """
    # fp64: a long answer's sum is of order 1e5, where fp32 keeps two decimals, and the loss lives
    # on the small difference of two such sums. segment_reduce adds in order: same input, same bits.
    trained = (logprobs.where(weights != 0, 0.0) * weights).double()
    sizes = sent(torch.tensor(tuple(lengths)), logprobs.device)
    # unsafe: else the host waits for the device to look at lengths that it made itself
    return torch.segment_reduce(trained, "sum", lengths=sizes, unsafe=True)


def chosen_nll(logprobs: Tensor, weights: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum over pairs of the chosen answer's mean negative log-likelihood per token.

    Added to DPO it keeps the chosen answers likely. A mean per answer, so that it does not depend
    on which pairs share a microbatch (TRL's `sft` term is a mean over the microbatch's tokens).

    Args:
        logprobs, weights, lengths: as for `sequence_logprobs`; chosen at even sequences.

    Example:
        >>> at = torch.tensor([-1.0, -3.0, -9.0])
        >>> chosen_nll(at, torch.ones(3), (2, 1)).item()
        2.0
    """
    sums = sequence_logprobs(logprobs, weights, lengths)[0::2]
    sizes = sequence_logprobs(torch.ones_like(weights), weights, lengths)[0::2]
    return -(sums / sizes).sum()


def dpo_loss(
    policy: Tensor,
    reference: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    aux: Tensor | None = None,
) -> Loss:
    """Sigmoid DPO, summed over pairs.

    Args:
        policy, reference: [2P], sequence log-probabilities of chosen and rejected in turn, as
            `sequence_logprobs` gives them on a batch of pairs; reference carries no gradient.
        beta: > 0, strength of the tie to the reference, per nat.
        label_smoothing: in [0, 0.5), probability that a label is wrong.
        aux: the model's own routing loss, handed on.

    Returns: sum over pairs; metrics rewards/chosen, rewards/rejected (nats times beta),
        rewards/margins and rewards/accuracies (a tie counts as wrong).

    Source: TRL 1.16 `loss_type="sigmoid"` without label smoothing; with it, the cDPO form.

    Example:
        >>> even = torch.tensor([-3.0, -5.0])
        >>> round(dpo_loss(even, even, beta=0.1).sum.item(), 6)
        0.693147
    """
    rewards = beta * (policy - reference)
    chosen, rejected = rewards[0::2], rewards[1::2]
    margins = chosen - rejected
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    count = margins.new_full((), len(margins))
    measured = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins),
    }
    return Loss(
        sum=losses.sum(),
        aux=aux,
        metrics={name: (values.detach().sum(), count) for name, values in measured.items()},
    )
