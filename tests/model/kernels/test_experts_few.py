"""The expert layer for few tokens against its reference, plain and with int8 weights."""

from __future__ import annotations

import pytest
import torch

from model.kernels.experts.reference import experts_reference
from tests.helpers import assert_close, slow
from tests.model.kernels import formula

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("tokens", [1, 17, *slow(2, 40)])
@pytest.mark.parametrize(
    ("dtype", "is_int8"),
    [
        (torch.float32, False),
        (torch.float16, True),
        *slow((torch.float16, False), (torch.float32, True)),
    ],
)
def test_few_tokens_are_the_reference(tokens: int, dtype: torch.dtype, is_int8: bool):
    formula.launch("experts_few")
    from model.kernels.experts_few.launch import expert_layer_few

    generator = torch.Generator().manual_seed(tokens)
    num_experts, size, inner, top_k = 5, 40, 24, 2

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = noise(tokens, size).to(dtype)
    chosen = torch.stack([
        torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(tokens)
    ])  # fmt: skip
    # one place over capacity
    chosen[0, 1] = num_experts
    weights = noise(tokens, top_k).softmax(-1)
    scales = None
    if is_int8:
        gate_up = torch.randint(-127, 128, (num_experts, 2 * inner, size), generator=generator)
        down = torch.randint(-127, 128, (num_experts, size, inner), generator=generator)
        scales = noise(num_experts, 2 * inner).abs() / 500, noise(num_experts, size).abs() / 500
        wide = [w * s[..., None] for w, s in zip((gate_up, down), scales, strict=True)]
        narrow = [gate_up.to(torch.int8), down.to(torch.int8)]
    else:
        narrow = [(noise(num_experts, 2 * inner, size) / 6).to(dtype)]
        narrow.append((noise(num_experts, size, inner) / 5).to(dtype))
        wide = [w.float() for w in narrow]
    device = formula.DEVICE
    found = expert_layer_few(
        x.to(device),
        *(w.to(device) for w in narrow),
        chosen.to(device),
        weights.to(device),
        scales=None if scales is None else tuple(s.to(device) for s in scales),
    )
    # an expert of zeros stands for the dropped place
    wide = [torch.cat((w, torch.zeros_like(w[:1]))) for w in wide]
    exact = experts_reference(x.float(), *wide, chosen, weights)
    assert_close("out", found.float().cpu(), exact, 1e-5 if dtype == torch.float32 else 2e-3)
