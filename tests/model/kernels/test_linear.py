from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.linear.op import Linear, is_faster_here, linear, product, weight_grad
from tests.helpers import assert_close


def run(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    out = linear(x, weight)
    out.backward(torch.linspace(-1.0, 1.0, out.numel(), dtype=x.dtype).view_as(out))
    return {"output": out, "gradient of x": x.grad, "gradient of weight": weight.grad}


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 96), (96, 32), (48, 48), (33, 7)])
@pytest.mark.parametrize("rows", [1, 255, 256, 1000])
def test_equals_the_product(rows: int, inputs: int, outputs: int):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    found, exact = run(x, weight), run(x.double(), weight.double())
    for name, value in exact.items():
        assert_close(name, found[name], value, 1e-6)


def test_both_ways_are_in_use():
    many, few, weight = torch.zeros(256, 8), torch.zeros(255, 8), torch.zeros(4, 8)
    assert is_faster_here(many, weight) == torch.backends.mkldnn.is_available()
    assert not is_faster_here(few, weight)
    assert not is_faster_here(many.double(), weight.double())
    assert not is_faster_here(many.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_faster_here(many, weight)


def test_fp32_is_kept_whatever_the_strides():
    torch.manual_seed(0)
    x, weight, grad = torch.randn(300, 40), torch.randn(24, 40), torch.randn(300, 24)
    assert_close("product", product(x, weight), x.double() @ weight.double().t(), 1e-6)
    assert_close("back", product(grad, weight.t()), grad.double() @ weight.double(), 1e-6)
    assert_close("weight", weight_grad(grad, x), grad.double().t() @ x.double(), 1e-6)
    cut = torch.randn(300, 80)[:, 20:60]
    assert_close("cut", product(cut, weight), cut.double() @ weight.double().t(), 1e-6)


def test_frozen_sides_get_no_gradient():
    x, weight = torch.randn(256, 8, requires_grad=True), torch.randn(4, 8)
    linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    x, weight = x.detach(), weight.requires_grad_()
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert x.grad is None


def test_autocast_multiplies_in_bf16():
    layer = Linear(16, 8)
    assert isinstance(layer, torch.nn.Linear)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(300, 16)).dtype == torch.bfloat16
