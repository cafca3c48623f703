"""The router of the experts: logits in fp32, the K greatest, their softmax.

softmax over all experts, the K greatest of it, divided by their sum, is softmax over the K
greatest logits: the sum over all cancels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in fp32 whatever the dtypes, out of autocast.

    Args:
        x: [T, C]; weight: [E, C].

    Returns: [T, E] fp32 (fp64 stays).

    Raises:
        ValueError: if shapes or devices do not fit.

    Example:
        >>> router_logits(torch.ones(1, 2).bfloat16(), torch.ones(3, 2).bfloat16())
        tensor([[2., 2., 2.]])
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}: expected [T, C] and [E, C]"
        )
    if x.device != weight.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}")
    wide = torch.promote_types(x.dtype, torch.float32)
    # two experts a hair apart must not swap places by rounding
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:
            return _Logits.apply(x, weight)
        return F.linear(x.to(wide), weight.to(wide))


class _Logits(torch.autograd.Function):
    """bf16 operands on tensor cores: their products are exact in fp32, in which they are summed.

    The gradient of the logits goes as two bf16 terms, which keep 16 of its bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        high = grad.to(x.dtype)
        # [T, 2E]
        terms = torch.cat((high, (grad - high).to(x.dtype)), dim=1)
        to_weight = None
        if needs_weight:
            both = torch.mm(terms.t(), x, out_dtype=torch.float32)
            to_weight = both.view(2, *weight.shape).sum(0).to(weight.dtype)
        return terms @ torch.cat((weight, weight)) if needs_x else None, to_weight


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K experts of each token and their weights, which sum to 1.

    Args:
        logits: [T, E] fp32 or fp64.
        top_k: K, 1 to E.

    Returns: weights [T, K] in the dtype of the logits, greatest first; chosen [T, K] int64.

    Raises:
        ValueError: if top_k does not lie in 1..E.

    Example:
        >>> weights, chosen = route(torch.tensor([[1.0, 0.0, 1.0]]), 2)
        >>> chosen.tolist(), weights.tolist()
        ([[0, 2]], [[0.5, 0.5]])
    """
    if logits.ndim != 2 or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            f"top_k = {top_k}, logits {tuple(logits.shape)}: expected [T, E] and 1 <= top_k <= E"
        )
    if logits.is_cuda and logits.dtype == torch.float32 and len(logits):
        # not at the top: torch for CPU comes without triton
        from model.kernels.experts.launch import route_triton

        return route_triton(logits, top_k)
    values, chosen = logits.topk(top_k, dim=-1)
    return values.softmax(-1), chosen


def replayed(logits: Tensor, chosen: Tensor, recorded: Tensor) -> tuple[Tensor, Tensor]:
    """What `route` gives when the choice was made elsewhere.

    The softmax is over the logits of the experts taken: of the router's own choice it gives the
    router's own weights, and its gradient reaches the logits of the experts that did the work.

    Args:
        logits: [T, E] fp32 or fp64.
        chosen: [T, K] int64, the router's own.
        recorded: [T, K] integers to be taken in its place; a row of -1 takes `chosen`.

    Returns: weights [T, K] in the dtype of the logits; taken [T, K] int64.

    Raises:
        ValueError: if recorded has another shape.

    Example:
        >>> logits, own = torch.tensor([[2.0, 1.0, 1.0]]), torch.tensor([[0, 1]])
        >>> weights, taken = replayed(logits, own, torch.tensor([[2, 1]]))
        >>> taken.tolist(), weights.tolist()
        ([[2, 1]], [[0.5, 0.5]])
    """
    if recorded.shape != chosen.shape:
        raise ValueError(
            f"recorded {tuple(recorded.shape)}: expected [T, K] = {tuple(chosen.shape)}; record "
            "them from a model of the same config"
        )
    recorded = recorded.long()
    taken = torch.where(recorded >= 0, recorded, chosen)
    return logits.gather(-1, taken).softmax(-1), taken
