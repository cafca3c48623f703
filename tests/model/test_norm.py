from __future__ import annotations

import warnings

import pytest
import torch

from model.norm import RMSNorm
from tests.helpers import assert_close


def norm(size: int, dtype: torch.dtype = torch.float32) -> RMSNorm:
    torch.manual_seed(0)
    module = RMSNorm(size, 1e-6)
    torch.nn.init.normal_(module.weight)
    return module.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize("shape", [(1, 128), (7, 3, 40), (1000, 128)])
def test_equals_the_formula_and_its_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, bound: float
):
    module = norm(shape[-1], dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    out = module(x)
    out.backward(grad)
    assert out.dtype == dtype
    wide, weight = (t.detach().double().requires_grad_() for t in (x, module.weight))
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight
    exact.backward(grad.double())
    assert_close("output", out, exact, bound)
    assert_close("gradient of x", x.grad, wide.grad, bound)
    assert_close("gradient of weight", module.weight.grad, weight.grad, bound)


def test_frozen_sides_get_no_gradient():
    module = norm(8)
    x = torch.randn(3, 8, requires_grad=True)
    module.requires_grad_(False)(x).sum().backward()
    assert x.grad is not None
    assert module.weight.grad is None
    module.requires_grad_(True)(x.detach()).sum().backward()
    assert module.weight.grad is not None


def test_autocast_warns_of_nothing():
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        assert norm(8)(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
