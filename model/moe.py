"""Mixture of experts: router, experts, and the losses and metrics of their load.

    h_t = sum_{i in TopK(x_t W_g)} p_i / (sum of the chosen p) * FFN_i(x_t),  p = softmax(x_t W_g)

Source: MiniMax-01 report, eq. 1 and section 2.1 (token-drop dispatch, auxiliary loss).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import HybridConfig
from model.kernels.experts.op import expert_layer
from model.kernels.experts.router import replayed, route, router_logits
from model.row import Row

WHOLE = Row()


class Router(nn.Module):
    """Logits of every expert for every token, in fp32 whatever the dtype of the model."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[T, C] -> [T, E] fp32 (fp64 stays)."""
        return router_logits(x, self.weight)


class Experts(nn.Module):
    """The experts' weights, stacked as transformers stacks them."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        experts, size, inner = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        )
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, size))
        self.down_proj = nn.Parameter(torch.empty(experts, size, inner))
        self.core: Callable[..., Tensor] = expert_layer

    def forward(
        self, x: Tensor, chosen: Tensor, weights: Tensor, in_pieces: bool = False
    ) -> Tensor:
        """[T, C], [T, K], [T, K] -> [T, C]."""
        return self.core(x, self.gate_up_proj, self.down_proj, chosen, weights, in_pieces=in_pieces)


class MoE(nn.Module):
    """Top-k routing to SwiGLU experts; drops tokens over capacity in training, if asked."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.capacity_factor = config.expert_capacity_factor
        self.gate = Router(config)
        self.experts = Experts(config)
        self.drop: Callable[..., Tensor] = drop_over_capacity

    def forward(
        self, x: Tensor, recorded: Tensor | None = None, in_pieces: bool = False
    ) -> tuple[Tensor, Tensor]:
        """[T, C] -> output [T, C] and router logits [T, E] fp32.

        Args:
            recorded: [T, K] integers, experts that an engine chose: they are taken in place of the
                router's, which weighs them, gradients and all; -1 leaves the choice to the router.
            in_pieces: as in `expert_layer`.
        """
        logits = self.gate(x)
        weights, chosen = route(logits, self.top_k)
        if recorded is not None:
            weights, chosen = replayed(logits, chosen, recorded)
        if self.training and self.capacity_factor > 0:
            chosen = self.drop(chosen, logits.shape[-1], self.capacity_factor)
        return self.experts(x, chosen, weights, in_pieces), logits


def drop_over_capacity(chosen: Tensor, num_experts: int, factor: float) -> Tensor:
    """Marks with E the places beyond an expert's capacity, first come first served.

    Args:
        chosen: [T, K] int64.
        factor: capacity is ceil(factor * T * K / E) tokens an expert.

    Example:
        >>> drop_over_capacity(torch.tensor([[0], [0], [0], [1]]), 2, 1.0).flatten().tolist()
        [0, 0, 2, 1]
    """
    capacity = math.ceil(factor * chosen.numel() / num_experts)
    in_order, order = chosen.flatten().sort(stable=True)
    first = torch.searchsorted(in_order, torch.arange(num_experts + 1, device=chosen.device))
    turn = torch.arange(len(order), device=chosen.device) - first[in_order]
    kept = in_order.masked_fill(turn >= capacity, num_experts)
    return torch.empty_like(kept).index_copy_(0, order, kept).view_as(chosen)


def balance_loss(
    router_logits: Sequence[Tensor],
    top_k: int,
    scaling: str = "switch",
    row: Row = WHOLE,
) -> Tensor:
    """Auxiliary loss that grows as the load of the experts grows uneven.

    f_i is the share of tokens that chose expert i (sum of f is K), P_i its mean probability.

    Args:
        router_logits: one [T, E] a layer.
        scaling: `switch`: E * sum f_i P_i over all layers' tokens together, as transformers
            computes it: K at balance. `paper`: (1/E) * sum (f_i / K) P_i, averaged over layers:
            1/E^2 at balance.
        row: takes means over this process's tokens to means over all that are counted.

    Source: MiniMax-01 report, section 2.1; PAPER notes the factor between the two forms.
    """
    loads, probabilities = [], []
    for logits in router_logits:
        loads.append(_load(logits, top_k))
        probabilities.append(logits.softmax(-1).mean(0))
    both = torch.stack([torch.stack(loads), torch.stack(probabilities)])
    load, probability = row.mean(both, router_logits[0].shape[0])
    experts = load.shape[-1]
    if scaling == "paper":
        return (load / top_k * probability).sum(-1).mean() / experts
    return experts * (load.mean(0) * probability.mean(0)).sum()


@torch.no_grad()
def _load(logits: Tensor, top_k: int) -> Tensor:
    """[T, E] -> [E]: share of tokens that chose each expert."""
    chosen = route(logits, top_k)[1].flatten()
    # not bincount: on CUDA it waits for the device
    experts = torch.arange(logits.shape[-1], device=logits.device)
    return (chosen[:, None] == experts).sum(0).to(logits.dtype) / logits.shape[0]


def router_z_loss(router_logits: Sequence[Tensor]) -> Tensor:
    """Mean over layers and tokens of (log-sum-exp of the router's logits)^2 (ST-MoE, eq. 5)."""
    return torch.stack([x.logsumexp(-1).square().mean() for x in router_logits]).mean()


def router_losses(
    config: HybridConfig, router_logits: Sequence[Tensor], row: Row = WHOLE
) -> Tensor | None:
    """The router's losses with their coefficients, a mean over tokens; None if all are 0."""
    losses = []
    if config.router_aux_loss_coef:
        balance = balance_loss(
            router_logits, config.num_experts_per_tok, config.router_aux_scaling, row
        )
        losses.append(config.router_aux_loss_coef * balance)
    if config.router_z_loss_coef:
        squares = row.mean(router_z_loss(router_logits), router_logits[0].shape[0])
        losses.append(config.router_z_loss_coef * squares)
    return sum(losses[1:], losses[0]) if losses else None


class RouterLoad(NamedTuple):
    """How evenly the experts were used.

    Args:
        share: [layers, E] share of the assignments, sum 1 a layer.
        worst: largest share times E over all layers: 1 is even, E / K is collapsed.
        dropped: share of assignments over capacity; 0 without a capacity.
    """

    share: Tensor
    worst: Tensor
    dropped: Tensor


@torch.no_grad()
def router_load(
    router_logits: Sequence[Tensor], top_k: int, capacity_factor: float = 0.0
) -> RouterLoad:
    """Load metrics of one forward, from its router logits ([T, E] a layer)."""
    share = torch.stack([_load(x, top_k) / top_k for x in router_logits])
    experts = share.shape[-1]
    dropped = torch.zeros(())
    if capacity_factor > 0:
        limit = math.ceil(capacity_factor * router_logits[0].shape[0] * top_k / experts)
        counts = share * router_logits[0].shape[0] * top_k
        dropped = (counts - limit).clamp(min=0).sum() / counts.sum()
    return RouterLoad(share, share.max() * experts, dropped)
