"""The fused head against the whole softmax: interpreted on a CPU (fp16), run on a GPU.

Triton's interpreter multiplies no bf16; `compile_ahead.py` compiles both.
"""

from __future__ import annotations

import functools
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.kernels.logprob import op
from model.kernels.logprob.reference import token_logprobs_reference
from tests.helpers import assert_close
from tests.model.kernels import formula

CUDA = formula.CUDA
DEVICE = formula.DEVICE
# gradients are products of slopes rounded to 16 bits; the rest is fp32 throughout
BOUND = {torch.float16: 2e-3, torch.bfloat16: 5e-3}
gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(scope="module")
def launch() -> ModuleType:
    return formula.launch("logprob")


class Case:
    """Random inputs and what to weigh the logprobs with; `run` gives outputs and gradients."""

    def __init__(self, tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(tokens, width).to(dtype)
        self.weight = (2 * torch.randn(vocabulary, width) * width**-0.5).to(dtype)
        self.targets = torch.randint(0, vocabulary, (tokens,))
        self.weights = torch.randn(tokens)
        self.dtype = dtype

    def run(self, form: object, *, wide: bool = False) -> dict[str, Tensor]:
        dtype = torch.float64 if wide else self.dtype
        leaves = [
            x.to(DEVICE, dtype, copy=True).requires_grad_() for x in (self.hidden, self.weight)
        ]
        logprobs, entropy = form(*leaves, self.targets.to(DEVICE))
        (logprobs * self.weights.to(DEVICE)).sum().backward()
        return {
            "logprobs": logprobs.detach(),
            "entropy": entropy.detach(),
            "gradient of hidden": leaves[0].grad,
            "gradient of weight": leaves[1].grad,
        }

    def check(self, launch: ModuleType, temperature: float = 1.0) -> None:
        form = functools.partial(launch.token_logprobs_triton, temperature=temperature)
        reference = functools.partial(token_logprobs_reference, temperature=temperature)
        found, exact = self.run(form), self.run(reference, wide=True)
        for name, value in exact.items():
            assert_close(name, found[name], value, BOUND[self.dtype] if "grad" in name else 1e-5)


@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "temperature"),
    [(1, 8, 129, 1.0), (65, 72, 300, 0.3), (300, 40, 257, 2.0)],
)
def test_equals_the_whole_softmax(
    launch: ModuleType, tokens: int, width: int, vocabulary: int, temperature: float
):
    Case(tokens, width, vocabulary, torch.float16).check(launch, temperature)


@pytest.mark.parametrize(("tokens", "vocabulary"), [(40, 520), (520, 40)])
def test_pieces_of_vocabulary_and_of_tokens_add_up(
    launch: ModuleType, monkeypatch: pytest.MonkeyPatch, tokens: int, vocabulary: int
):
    monkeypatch.setattr(launch, "PIECE_BYTES", 1)
    Case(tokens, 16, vocabulary, torch.float16).check(launch)


def test_frozen_side_gets_no_gradient(launch: ModuleType):
    hidden, weight = (torch.randn(n, 16, device=DEVICE).half() for n in (3, 9))
    targets = torch.tensor([0, 8, 4], device=DEVICE)
    for leaf, other in ((hidden, weight), (weight, hidden)):
        leaf.requires_grad_()
        launch.token_logprobs_triton(hidden, weight, targets, 1.0)[0].sum().backward()
        assert leaf.grad is not None
        assert other.grad is None
        leaf.requires_grad_(False)
        leaf.grad = None


def test_large_logits_stay_finite_and_a_target_outside_is_nan(launch: ModuleType):
    hidden = torch.full((2, 8), 100.0, device=DEVICE).half()
    weight = torch.tensor([[10.0], [9.0], [-9.0]], device=DEVICE).half().expand(3, 8).contiguous()
    targets = torch.tensor([1, 3], device=DEVICE)
    logprobs, entropy = launch.token_logprobs_triton(hidden, weight, targets, 1.0)
    assert logprobs[0].item() == pytest.approx(-800.0)
    assert logprobs[1].isnan()
    assert entropy.tolist() == [0.0, 0.0]


def test_entropy_keeps_its_digits_where_it_is_small(launch: ModuleType):
    hidden = torch.eye(1, 8, device=DEVICE).half()
    weight = torch.zeros(200, 8, device=DEVICE).half()
    weight[7, 0] = 12.0
    _, entropy = launch.token_logprobs_triton(hidden, weight, torch.tensor([7], device=DEVICE), 1.0)
    logprobs = (hidden.double() @ weight.double().T).log_softmax(-1)
    assert_close("entropy", entropy, -(logprobs.exp() * logprobs).sum(-1), 1e-4)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("vocabulary", [33, 1000, 32000])
def test_the_whole_matrix(launch: ModuleType, tokens: int, vocabulary: int):
    for width in (8, 72, 2048):
        Case(tokens, width, vocabulary, torch.bfloat16).check(launch, 0.7)


@pytest.mark.gpu
@gpu
def test_the_largest_vocabulary(launch: ModuleType):
    Case(4096, 512, 200_064, torch.bfloat16).check(launch)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_entry_waits_for_nothing(dtype: torch.dtype):
    hidden, weight = (torch.randn(n, 64, device="cuda", dtype=dtype) for n in (5000, 9000))
    hidden.requires_grad_()
    targets = torch.zeros(5000, dtype=torch.int64, device="cuda")
    op.token_logprobs(hidden, weight, targets)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.token_logprobs(hidden, weight, targets)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
