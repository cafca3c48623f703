from __future__ import annotations

import pytest
import torch

from model.kernels.norm.op import rms_norm
from model.kernels.norm.reference import norm_reference
from tests.helpers import TOLERANCE, assert_close

pytestmark = pytest.mark.usefixtures("cpu_form")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_on_a_cpu_equals_the_formula_in_every_dtype(dtype: torch.dtype):
    torch.manual_seed(0)
    # weights stay fp32 under autocast, whatever the dtype of the activations
    leaves = [torch.randn(65, 80).to(dtype), torch.randn(80)]
    own = [x.clone().requires_grad_() for x in leaves]
    exact = [x.double().requires_grad_() for x in leaves]
    grad = torch.randn(65, 80).to(dtype)
    found, expected = rms_norm(*own, 1e-5), norm_reference(*exact, 1e-5)
    assert found.dtype == dtype
    found.backward(grad)
    expected.backward(grad.double())
    # an fp32 weight's gradient is rounded to fp32
    for name, a, b, type_ in (
        ("norm", found, expected, dtype),
        ("gradient of x", own[0].grad, exact[0].grad, dtype),
        ("gradient of weight", own[1].grad, exact[1].grad, torch.float32),
    ):
        assert a is not None
        assert b is not None
        assert_close(name, a, b, TOLERANCE[type_])
