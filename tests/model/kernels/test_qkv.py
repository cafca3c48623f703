from __future__ import annotations

import pytest
import torch

from model.kernels.qkv.op import silu_qkv
from model.kernels.qkv.reference import silu_qkv_reference
from tests.helpers import TOLERANCE, assert_close

pytestmark = pytest.mark.usefixtures("cpu_form")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "size"), [(1, 1, 32), (65, 3, 32), (130, 2, 80), (3, 2, 300)]
)
def test_equals_the_definition_head_by_head(dtype: torch.dtype, tokens: int, heads: int, size: int):
    torch.manual_seed(0)
    x = torch.randn(tokens, 3 * heads * size).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found, expected = silu_qkv(x, heads), silu_qkv_reference(exact, heads)
    grads = [torch.randn(tokens, heads, size).to(dtype) for _ in found]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    for name, own, other in zip("qkv", found, expected, strict=True):
        assert own.dtype == dtype
        assert_close(name, own, other, TOLERANCE[dtype])
    assert x.grad is not None
    assert exact.grad is not None
    assert_close("gradient", x.grad, exact.grad, TOLERANCE[dtype])


def test_leaves_its_input_as_it_was():
    x = torch.randn(65, 96).bfloat16()
    before = x.clone()
    silu_qkv(x, 1)
    assert torch.equal(x, before)
