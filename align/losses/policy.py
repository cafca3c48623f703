"""Policy-gradient losses for online RL: clipped ratios (GRPO family) and CISPO.

With r = pi / behaviour per token and A its advantage:

    clip:   -min(r A, clip(r, 1 - low, 1 + high) A)
    cispo:  -sg(min(r, is_max)) A log pi

plus beta * k3(pi || ref). What a token's loss is divided by is a name too: its sequence's length
and the number of sequences (grpo), a constant length (dr_grpo), or all trained tokens (dapo,
cispo). `policy_count` is that denominator; it needs no model, so it is known before the first
backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from align.losses.types import Loss
from model.packed import sent

# objective -> (token loss, denominator)
OBJECTIVES = {
    "grpo": ("clip", "sequence"),
    "dr_grpo": ("clip", "constant"),
    "dapo": ("clip", "token"),
    "cispo": ("cispo", "token"),
}


class PolicyLossConfig(BaseModel):
    """Which policy-gradient loss, and its bounds, all on the raw ratio pi / behaviour.

    Example:
        >>> PolicyLossConfig(objective="cispo", is_max=5.0).beta
        0.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: Literal["grpo", "dr_grpo", "dapo", "cispo"] = "grpo"
    """Token loss and denominator by name."""
    epsilon_low: float = Field(default=0.2, gt=0, le=1)
    """Clipping starts below 1 - epsilon_low; not used by cispo."""
    epsilon_high: float = Field(default=0.2, gt=0)
    """Clipping starts above 1 + epsilon_high; not used by cispo."""
    ratio_cap: float = Field(default=0.0, ge=0)
    """Largest ratio in the unclipped term (TRL's delta); 0 caps nothing."""
    drop_ratio: float = Field(default=0.0, ge=0)
    """Tokens with A < 0 and a larger ratio leave the loss, the report's extra clip; 0: none."""
    is_max: float = Field(default=5.0, gt=0)
    """CISPO's largest importance weight, absolute (1 is on-policy)."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL estimate k3 to the reference; 0 needs no reference."""
    max_response_tokens: int = Field(default=1024, ge=1)
    """Constant length by which dr_grpo divides, in tokens."""


def _sequence_sums(values: Tensor, lengths: Sequence[int]) -> Tensor:
    sizes = sent(torch.tensor(tuple(lengths)), values.device)
    # unsafe: else the host waits for the device to look at lengths that it made itself
    return torch.segment_reduce(values, "sum", lengths=sizes, unsafe=True)


def policy_count(weights: Tensor, lengths: Sequence[int], config: PolicyLossConfig) -> float:
    """What one microbatch adds to the denominator.

    Args:
        weights: [T] fp32, 1 on trained response tokens.
        lengths: tokens of each sequence, sum T.

    Example:
        >>> weights = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
        >>> [policy_count(weights, (3, 3), PolicyLossConfig(objective=name))
        ...  for name in ("grpo", "dapo")]
        [2.0, 3.0]
    """
    denominator = OBJECTIVES[config.objective][1]
    if denominator == "token":
        return float(weights.sum())
    sequences = float((_sequence_sums(weights, lengths) > 0).sum())
    return sequences * (config.max_response_tokens if denominator == "constant" else 1)


def _token_loss(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """([T] loss, [T] where the bound is what counts)."""
    if OBJECTIVES[config.objective][0] == "cispo":
        capped = ratio.detach().clamp(max=config.is_max)
        return -capped * advantages * logprobs, ratio > config.is_max
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
    unclipped = ratio.clamp(max=config.ratio_cap) if config.ratio_cap else ratio
    loss = -torch.min(unclipped * advantages, ratio.clamp(low, high) * advantages)
    clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    return loss, clipped


def policy_loss(
    logprobs: Tensor,
    *,
    behaviour: Tensor,
    advantages: Tensor,
    weights: Tensor,
    lengths: Sequence[int],
    config: PolicyLossConfig,
    reference: Tensor | None = None,
    entropy: Tensor | None = None,
    aux: Tensor | None = None,
) -> Loss:
    """Policy-gradient loss, summed so that dividing by the global `policy_count` gives its mean.

    Args:
        logprobs: [T] fp32 under the policy, with a gradient.
        behaviour: [T] fp32 under the policy that sampled, no gradient.
        advantages: [T] fp32.
        weights: [T] fp32, 1 on trained response tokens, else 0.
        lengths: tokens of each sequence, sum T.
        reference: [T] fp32 under the reference, needed when config.beta > 0.
        entropy: [T] of the policy, for the metric only.
        aux: the model's own routing loss, handed on.

    Returns: sum; metrics ratio/mean, ratio/clipped, kl, entropy; maxima ratio/max. Ratios are
        measured raw, before any bound.

    Raises:
        ValueError: if config.beta > 0 without reference.

    Source: TRL 1.16 GRPOTrainer._compute_loss; CISPO: MiniMax-M1 eq. 4-5 with an absolute cap.
        Where we differ: the log-ratio is bounded at 20 (a weight of 4.9e8), drop_ratio.

    Example:
        >>> at = torch.tensor([-1.0, -2.0])
        >>> loss = policy_loss(at, behaviour=at, advantages=torch.ones(2), weights=torch.ones(2),
        ...                    lengths=(2,), config=PolicyLossConfig())
        >>> loss.sum.item()
        -1.0
    """
    if config.beta and reference is None:
        raise ValueError(
            f"policy loss beta = {config.beta:g} needs reference log-probabilities; "
            "pass reference or set beta to 0"
        )
    trained = weights != 0
    log_ratio = (logprobs - behaviour).where(trained, 0.0)
    # Bounded so that exp stays finite: 0 * inf in the backward of the unselected branch is NaN.
    ratio = log_ratio.clamp(max=20.0).exp()
    loss, bounded = _token_loss(ratio, logprobs.where(trained, 0.0), advantages, config)
    count = weights.sum()
    metrics = {
        "ratio/mean": ((ratio.detach() * weights).sum(), count),
        "ratio/clipped": ((bounded * weights).sum(), count),
    }
    if config.drop_ratio:
        dropped = (advantages < 0) & (ratio.detach() > config.drop_ratio)
        loss = loss.where(~dropped, 0.0)
        metrics["ratio/dropped"] = ((dropped * weights).sum(), count)
    if reference is not None:
        gap = (reference - logprobs).where(trained, 0.0)
        kl = gap.exp() - gap - 1
        loss = loss + config.beta * kl
        metrics["kl"] = ((kl.detach() * weights).sum(), count)
    if entropy is not None:
        metrics["entropy"] = ((entropy.detach() * weights).sum(), count)
    if OBJECTIVES[config.objective][1] == "sequence":
        sizes = _sequence_sums(weights, lengths).clamp_min(1.0)
        total = (_sequence_sums(loss * weights, lengths) / sizes).sum()
    else:
        total = (loss * weights).sum()
    largest = ratio.detach().where(trained, 0.0).max()
    return Loss(sum=total, aux=aux, metrics=metrics, maxima={"ratio/max": largest})
