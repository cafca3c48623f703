"""Experts' weights in int8 for an engine: half the bytes that a decode step reads.

    w ~ scale * n,  n = round(w / scale) in -127..127,  scale = max |w| / 127 of an output channel

The engine then samples from the rounded policy, prompt and response alike, and its
log-probabilities are that policy's: a trainer's ratio to its own weights shows the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from model.kernels.experts.op import expert_layer
from model.moe import Experts

LARGEST = 127


class Int8Experts:
    """Stands for the `core` of one layer's experts, with rounded copies of their weights."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts
        self.weights: list[tuple[Tensor, Tensor]] = []
        for weight in (experts.gate_up_proj, experts.down_proj):
            rounded = torch.empty_like(weight, dtype=torch.int8, requires_grad=False)
            scale = torch.empty(weight.shape[:2], dtype=torch.float32, device=weight.device)
            self.weights.append((rounded, scale))

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the weights as they are now, in place: a graph reads them where they lie."""
        live = self.experts.gate_up_proj, self.experts.down_proj
        for weight, (rounded, scale) in zip(live, self.weights, strict=True):
            for expert in range(len(weight)):
                wide = weight[expert].float()
                # a channel of zeros stays zero
                scale[expert] = (wide.abs().amax(-1) / LARGEST).clamp_min(1e-30)
                rounded[expert] = (wide / scale[expert][:, None]).round().to(torch.int8)

    def __call__(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        chosen: Tensor,
        weights: Tensor,
        *,
        in_pieces: bool = False,
    ) -> Tensor:
        """As `expert_layer`, of the rounded weights."""
        (gate_up, gate_up_scale), (down, down_scale) = self.weights
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            # not at the top: torch for CPU comes without triton
            from model.kernels.experts_few.launch import MAX_PLACES, expert_layer_few

            if chosen.numel() <= MAX_PLACES:
                scales = gate_up_scale, down_scale
                return expert_layer_few(x, gate_up, down, chosen, weights, scales=scales)
        wide_gate_up = (gate_up * gate_up_scale[..., None]).to(x.dtype)
        wide_down = (down * down_scale[..., None]).to(x.dtype)
        return expert_layer(x, wide_gate_up, wide_down, chosen, weights, in_pieces=in_pieces)


def int8_experts(model: nn.Module) -> list[Int8Experts]:
    """One for each layer.

    Raises:
        ValueError: if experts are adapted or spread over ranks, which rounding would not see.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), Experts):
            raise ValueError(
                f"engine: {name} has an adapter; int8 experts need plain weights: merge it, or "
                'set experts="live"'
            )
        if isinstance(module, Experts):
            if module.core is not expert_layer:
                raise ValueError(
                    f"engine: {name} is spread over ranks; int8 experts need whole ones: set "
                    'experts="live"'
                )
            found.append(Int8Experts(module))
    return found


@contextmanager
def in_place_of_live(rounded: list[Int8Experts]) -> Iterator[None]:
    """The model multiplies by the rounded weights inside."""
    for one in rounded:
        one.experts.core = one
    try:
        yield
    finally:
        for one in rounded:
            one.experts.core = expert_layer
