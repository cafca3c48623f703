from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.logprob.op import head_logits, token_logprobs
from model.kernels.logprob.reference import token_logprobs_reference
from tests.helpers import assert_close


def run(
    form: str, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> dict[str, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    function = token_logprobs if form == "op" else token_logprobs_reference
    logprobs, entropy = function(*leaves, targets, temperature=temperature)
    (logprobs * torch.linspace(-1.0, 2.0, targets.numel(), dtype=torch.float64)).sum().backward()
    return {
        "logprobs": logprobs,
        "entropy": entropy,
        "gradient of hidden": leaves[0].grad,
        "gradient of weight": leaves[1].grad,
    }


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("tokens", [1, 65, 2049, 5000])
def test_equals_the_whole_softmax(tokens: int, temperature: float):
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 16), torch.randn(33, 16) * 0.3
    targets = torch.randint(0, 33, (tokens,))
    found = run("op", hidden, weight, targets, temperature)
    exact = run("reference", hidden.double(), weight.double(), targets, temperature)
    for name, value in exact.items():
        assert_close(name, found[name], value, 1e-6)


def test_large_logits_stay_finite_and_exact():
    hidden, weight = torch.full((1, 1), 1e4), torch.tensor([[1.0], [0.999], [-1.0]])
    found = run("op", hidden, weight, torch.tensor([1]), 1.0)
    assert_close("logprobs", found["logprobs"], torch.tensor([-10.0000457]), 1e-4)
    assert torch.isfinite(found["gradient of hidden"]).all()


def test_frozen_weight_gets_no_gradient():
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4)
    token_logprobs(hidden, weight, torch.tensor([0, 1, 2]))[0].sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_fp32_head_multiplies_bf16_weights_in_fp32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 64).bfloat16(), torch.randn(33, 64).bfloat16()
    exact = hidden.double() @ weight.double().T
    assert_close("logits", head_logits(hidden, weight, head_fp32=True), exact, 1e-6)
    targets = torch.arange(9)
    found, _ = token_logprobs(hidden, weight, targets, head_fp32=True)
    assert_close("logprobs", found, exact.log_softmax(-1).gather(1, targets[:, None])[:, 0], 1e-6)
    assert found.dtype == torch.float32


def test_entropy_is_left_out_unasked_and_in_fp32_under_autocast():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 16), torch.randn(33, 16), torch.arange(9)
    exact = run("reference", hidden.double(), weight.double(), targets, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        _, entropy = token_logprobs(hidden, weight, targets)
        logprobs, none = token_logprobs(hidden, weight, targets, with_entropy=False)
    assert none is None
    assert_close("entropy", entropy, exact["entropy"], 1e-6)
    assert_close("logprobs", logprobs, exact["logprobs"], 1e-6)


def test_wrong_arguments_are_refused():
    hidden, weight = torch.zeros(3, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"expected \[T, C\], \[V, C\], \[T\]"):
        token_logprobs(hidden, weight, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"temperature = 0\.0, expected > 0"):
        token_logprobs(hidden, weight, torch.tensor([0, 1, 2]), temperature=0.0)
