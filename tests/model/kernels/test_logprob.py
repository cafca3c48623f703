from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.cpu import passes
from model.kernels.logprob.op import head_logits, token_logprobs
from model.kernels.logprob.reference import token_logprobs_reference
from tests.helpers import assert_close


def run(
    form: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    with_entropy: bool = True,
) -> dict[str, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    if form == "op":
        logprobs, entropy = token_logprobs(
            *leaves, targets, temperature=temperature, with_entropy=with_entropy
        )
    else:
        logprobs, entropy = token_logprobs_reference(*leaves, targets, temperature=temperature)
    (logprobs * torch.linspace(-1.0, 2.0, targets.numel(), dtype=torch.float64)).sum().backward()
    found = {
        "logprobs": logprobs,
        "gradient of hidden": leaves[0].grad,
        "gradient of weight": leaves[1].grad,
    }
    return found if entropy is None else found | {"entropy": entropy}


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("tokens", [1, 65, 2049, 5000])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.usefixtures("cpu_form")
def test_equals_the_whole_softmax(tokens: int, temperature: float, with_entropy: bool):
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 16), torch.randn(33, 16) * 0.3
    targets = torch.randint(0, 33, (tokens,))
    found = run("op", hidden, weight, targets, temperature, with_entropy)
    exact = run("reference", hidden.double(), weight.double(), targets, temperature)
    assert ("entropy" in found) == with_entropy
    for name, value in found.items():
        assert_close(name, value, exact[name], 1e-6)


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
        _, entropy = token_logprobs(hidden, weight, targets, head_fp32=True)
        logprobs, none = token_logprobs(hidden, weight, targets, head_fp32=True, with_entropy=False)
    assert none is None
    assert_close("entropy", entropy, exact["entropy"], 1e-6)
    assert_close("logprobs", logprobs, exact["logprobs"], 1e-6)


def test_wrong_arguments_are_refused():
    hidden, weight = torch.zeros(3, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"expected \[T, C\], \[V, C\], \[T\]"):
        token_logprobs(hidden, weight, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"temperature = 0\.0, expected > 0"):
        token_logprobs(hidden, weight, torch.tensor([0, 1, 2]), temperature=0.0)


@pytest.mark.skipif(passes.library() is None, reason="model/kernels/cpu was not built")
@pytest.mark.parametrize("target", [-1, 5])
def test_target_that_is_no_word_is_refused(target: int):
    with pytest.raises(ValueError, match=rf"targets {target} to {target}: expected 0 to 4"):
        token_logprobs(
            torch.ones(1, 2), torch.ones(5, 2), torch.tensor([target]), with_entropy=False
        )


@pytest.mark.parametrize("head_fp32", [False, True])
def test_autocast_decides_how_an_fp32_head_multiplies_unless_it_is_to_be_fp32(head_fp32: bool):
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16), torch.randn(33, 16, requires_grad=True)
    targets = torch.randint(0, 33, (40,))
    short = weight.detach() if head_fp32 else weight.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = token_logprobs(hidden, weight, targets, head_fp32=head_fp32)
        logits = head_logits(hidden, weight, head_fp32=head_fp32)
    assert logits.dtype == logprobs.dtype == torch.float32
    assert torch.equal(logits, head_logits(hidden, short, head_fp32=head_fp32))
    assert torch.equal(logprobs, token_logprobs(hidden, short, targets, head_fp32=head_fp32)[0])
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
