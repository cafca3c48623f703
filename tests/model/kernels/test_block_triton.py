"""Rotary and silu in their Triton form, and the whole model with every form of the block."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.config import preset
from model.hybrid import HybridForCausalLM
from model.kernels.norm import op as norm_op
from model.kernels.qkv import op as qkv_op
from model.kernels.qkv.reference import silu_qkv_reference
from model.kernels.rotary import op as rotary_op
from model.kernels.rotary.reference import rotate_reference
from model.packed import Packed
from model.rotary import rotary_angles
from tests.helpers import assert_close
from tests.model.kernels.formula import (
    CUDA,
    DEVICE,
    DTYPES,
    LENGTHS,
    Case,
    Form,
    check,
    launch,
    noise,
)

pytestmark = pytest.mark.usefixtures("poison")
EPS = 1e-6


def qkv_case(
    total: int, heads: int, dim: int, dtype: torch.dtype, *, is_strided: bool = False
) -> Case:
    x = noise(total, 3 * heads * dim, dtype=dtype, seed=4, is_strided=is_strided)
    return Case({"x": x}, (heads,))


def rotary_case(
    total: int,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    *,
    is_strided: bool = False,
) -> Case:
    """heads: H, G; sizes: D, R."""
    dim, turning = sizes
    q, k = (noise(total, n, dim, dtype=dtype, seed=n, is_strided=is_strided) for n in heads)
    positions = torch.randint(100_000, (total,), generator=torch.Generator().manual_seed(5))
    return Case({"q": q, "k": k}, rotary_angles(positions, turning, 10_000.0))


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin)


@pytest.mark.parametrize(
    ("total", "heads", "dim", "dtype"),
    [
        (1, 3, 32, torch.float32),
        (65, 3, 24, torch.bfloat16),
        (64, 1, 128, torch.float16),
    ],
)
@pytest.mark.parametrize("is_strided", [False, True])
def test_silu_of_qkv(total: int, heads: int, dim: int, dtype: torch.dtype, is_strided: bool):
    case = qkv_case(total, heads, dim, dtype, is_strided=is_strided)
    check(launch("qkv").silu_qkv_triton, silu_qkv_reference, case)


def test_silu_of_qkv_takes_gradients_of_any_strides():
    form = launch("qkv").silu_qkv_triton

    def turned(function: Form) -> Form:
        # the gradient of a transpose is a transposed view
        return lambda *a: tuple(x.transpose(0, 2) * 2 for x in function(*a))

    case = qkv_case(5, 3, 16, torch.float32)
    check(turned(form), turned(silu_qkv_reference), case)


@pytest.mark.parametrize(
    ("total", "heads", "sizes", "dtype"),
    [
        (1, (1, 1), (32, 32), torch.float32),
        (65, (3, 1), (24, 12), torch.bfloat16),
        (63, (8, 2), (64, 16), torch.float16),
        (5, (5, 5), (128, 64), torch.float32),
    ],
)
@pytest.mark.parametrize("is_strided", [False, True])
def test_rotary(
    total: int,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    is_strided: bool,
):
    case = rotary_case(total, heads, sizes, dtype, is_strided=is_strided)
    check(launch("rotary").rotate_triton, rotate_both, case)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: norm_op.rms_norm(x, torch.ones(7), EPS), r"weight \(7,\), expected .* of x"),
        (lambda x: norm_op.rms_norm(x, torch.ones(8, device="meta"), EPS), "weight is on meta"),
        (
            lambda x: norm_op.join_norm(x, x[:1], torch.ones(8), EPS),
            r"branch \(1, 8\) on cpu, expected as residual: \(2, 8\)",
        ),
        (
            lambda x: norm_op.gated_norm(x, x.to("meta"), torch.ones(8), EPS),
            r"gate \(2, 8\) on meta, expected as x",
        ),
        (lambda x: qkv_op.silu_qkv(x, 3), r"heads = 3: expected .* a multiple of 9"),
        (
            lambda x: rotary_op.rotate(x, x, x, x),
            r"expected \[T, H, D\] and \[T, G, D\]",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: Callable[[Tensor], object], message: str):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 8))


def test_angles_that_do_not_fit_are_refused():
    q, cos = torch.zeros(2, 3, 8), torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match=r"cos \(2, 1, 3\).* R even and <= D = 8"):
        rotary_op.rotate(q, q, cos[..., :3], cos[..., :3])
    with pytest.raises(ValueError, match=r"T = 2"):
        rotary_op.rotate(q, q, cos[:1], cos[:1])
    with pytest.raises(ValueError, match=r"q torch.float32, k torch.bfloat16"):
        rotary_op.rotate(q, q.bfloat16(), cos, cos)
    with pytest.raises(ValueError, match="sin on meta: expected one device"):
        rotary_op.rotate(q, q, cos, cos.to("meta"))


@pytest.mark.parametrize(("postnorm", "is_checkpointed"), [(True, True), (False, False)])
def test_whole_model_gives_the_same_loss_and_gradients(
    postnorm: bool, is_checkpointed: bool, monkeypatch: pytest.MonkeyPatch
):
    gains = {"linear_attn_alpha_factor": 1.3, "full_attn_alpha_factor": 1.2, "mlp_beta_factor": 0.7}
    kinds = ["linear_attention", "full_attention"]
    config = preset(
        "tiny", num_hidden_layers=2, layer_types=kinds, postnorm=postnorm, vocab_size=64, **gains
    )
    torch.manual_seed(0)
    model = HybridForCausalLM(config).train()
    for parameter in model.parameters():
        # weights of norms other than 1
        parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    for room in ("norm", "qkv", "rotary"):
        launch(room)

    def choose(is_triton: bool) -> None:
        for op in (norm_op, qkv_op, rotary_op):
            monkeypatch.setattr(op, "_runs_triton", lambda *a: is_triton)

    choose(is_triton=False)
    expected = loss_and_gradients(model, DEVICE)
    choose(is_triton=True)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = loss_and_gradients(model, DEVICE)
    for name, value in expected.items():
        assert_close(name, found[name], value, 1e-4)


def loss_and_gradients(model: HybridForCausalLM, device: str) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(device)
    tokens = torch.arange(70) * 37 % 64
    packed = Packed.from_sequences([tokens[:41].tolist(), tokens[41:].tolist()], device=device)
    out = model(packed=packed, targets=tokens.roll(-1).to(device))
    loss = -out.logprobs.mean()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_the_whole_matrix_of_heads(total: int, dim: int, dtype: torch.dtype):
    for is_strided in (False, True):
        case = qkv_case(total, 3, dim, dtype, is_strided=is_strided)
        check(launch("qkv").silu_qkv_triton, silu_qkv_reference, case)
        for turning in (dim // 2, dim):
            case = rotary_case(total, (5, 1), (dim, turning), dtype, is_strided=is_strided)
            check(launch("rotary").rotate_triton, rotate_both, case)
