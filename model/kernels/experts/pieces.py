"""The expert layer for rows whose [g | u] would not fit: some tokens at a time, computed again.

Forward keeps the layer's inputs and nothing else. Backward runs each piece again with its backward;
gradients of the weights are summed over the pieces in fp32.

Two nodes of the graph do it. The first takes the inputs, keeps them, and gives a tensor that holds
nothing; the second gives the output, keeps nothing, and hands its gradient to the first. So a
checkpoint around the layer, which computes again until all that was kept is there, stops before the
experts: they run twice, not three times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# tokens that are computed at once; the base then needs 6 GB, and an expert still has thousands
PIECE_TOKENS = 65_536

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def experts_in_pieces(
    layer: Layer, x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """layer(x, ...) of all tokens, from pieces of PIECE_TOKENS.

    Args:
        layer: computes any number of tokens, each by itself; the rest is as it takes them.
    """
    given = (x, gate_up, down, weights)
    hollow = _Keep.apply(layer, chosen, *given)
    return _Compute.apply(hollow, layer, chosen, *(tensor.detach() for tensor in given))


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, chosen: Tensor, *given: Tensor) -> Tensor:
        ctx.save_for_backward(chosen, *given)
        ctx.layer = layer
        device = given[0].device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return given[0].new_empty(1, 1).expand(given[0].shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chosen, *given = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        enabled, dtype = ctx.autocast
        sums = _Sums(given, needs)
        with torch.autocast(grad.device.type, dtype=dtype, enabled=enabled):
            for piece in _pieces(chosen):
                own = [
                    tensor.detach().requires_grad_(need)
                    for tensor, need in zip(_own(given, piece), needs, strict=True)
                ]
                with torch.enable_grad():
                    out = ctx.layer(*own[:3], chosen[piece], own[3])
                sums.add(piece, torch.autograd.grad(out, sums.wanted(own), grad[piece]))
        return None, None, *sums.found()


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hollow: Tensor, layer: Layer, chosen: Tensor, *given: Tensor) -> Tensor:
        found = []
        for piece in _pieces(chosen):
            x, gate_up, down, weights = _own(given, piece)
            found.append(layer(x, gate_up, down, chosen[piece], weights))
        return found[0] if len(found) == 1 else torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None, None, None


def _pieces(chosen: Tensor) -> list[slice]:
    starts = range(0, max(len(chosen), 1), PIECE_TOKENS)
    return [slice(start, start + PIECE_TOKENS) for start in starts]


def _own(given: Any, piece: slice) -> tuple[Tensor, ...]:
    x, gate_up, down, weights = given
    return x[piece], gate_up, down, weights[piece]


class _Sums:
    """Gradients of x, gate_up, down and weights, put together from those of pieces."""

    def __init__(self, given: list[Tensor], needs: tuple[bool, ...]) -> None:
        self.given, self.needs = given, needs
        self.by_token: dict[int, list[Tensor]] = {0: [], 3: []}
        self.summed: dict[int, Tensor] = {}

    def wanted(self, own: list[Tensor]) -> list[Tensor]:
        return [tensor for tensor, need in zip(own, self.needs, strict=True) if need]

    def add(self, piece: slice, grads: tuple[Tensor, ...]) -> None:
        which = [number for number, need in enumerate(self.needs) if need]
        for number, grad in zip(which, grads, strict=True):
            if number in self.by_token:
                self.by_token[number].append(grad)
            elif number not in self.summed:
                self.summed[number] = grad
            else:
                # fp32: sixteen sums rounded to bf16 would lose what is small
                wide = torch.promote_types(grad.dtype, torch.float32)
                self.summed[number] = self.summed[number].to(wide).add_(grad)

    def found(self) -> list[Tensor | None]:
        grads: list[Tensor | None] = [None] * len(self.given)
        for number, parts in self.by_token.items():
            if parts:
                grads[number] = parts[0] if len(parts) == 1 else torch.cat(parts)
        for number, total in self.summed.items():
            grads[number] = total.to(self.given[number].dtype)
        return grads
