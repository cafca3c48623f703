"""What the passes in C must hold beside the numbers, which each op's own tests hold to."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from model.kernels.attention.op import packed_attention
from model.kernels.cpu import passes
from model.kernels.experts.op import expert_layer
from model.kernels.lightning.op import lightning_attention
from model.kernels.norm.op import gated_norm, join_norm, rms_norm
from model.kernels.norm.reference import gated_norm_reference, join_norm_reference
from model.kernels.qkv.op import silu_qkv
from tests.helpers import TOLERANCE, assert_close

DTYPES = [torch.float32, torch.bfloat16]
built = pytest.mark.skipif(passes.library() is None, reason="model/kernels/cpu was not built")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def with_grads(function: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> list[Tensor]:
    """Outputs and gradients, of outputs weighted by fixed noise."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in out]
    torch.autograd.backward(out, [w.to(x.dtype) for w, x in zip(weights, out, strict=True)])
    assert all(leaf.grad is not None for leaf in leaves)
    return [x.detach() for x in out] + [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.usefixtures("cpu_form", "poison")
@pytest.mark.parametrize("columns", [33, 96, 300])
@pytest.mark.parametrize("postnorm", [True, False])
@pytest.mark.parametrize(("dtype", "branch"), [*zip(DTYPES, DTYPES, strict=True), DTYPES])
def test_join_and_norm_equal_the_formula(
    dtype: torch.dtype, branch: torch.dtype, postnorm: bool, columns: int
):
    torch.manual_seed(0)
    given = noise(130, columns, dtype=dtype), noise(130, columns, dtype=branch), noise(columns)
    options = {"gain": (1.5, 0.7), "postnorm": postnorm}
    found = with_grads(lambda *x: join_norm(*x, 1e-5, **options), *given)
    exact = with_grads(
        lambda *x: join_norm_reference(*x, 1e-5, **options), *(x.double() for x in given)
    )
    bound = TOLERANCE[torch.bfloat16 if torch.bfloat16 in (dtype, branch) else dtype]
    for own, other in zip(found, exact, strict=True):
        assert_close("join_norm", own, other, bound)


@pytest.mark.usefixtures("cpu_form", "poison")
@pytest.mark.parametrize("columns", [33, 96, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_norm_equals_the_formula(dtype: torch.dtype, columns: int):
    torch.manual_seed(0)
    given = noise(130, columns, dtype=dtype), noise(130, columns, dtype=dtype), noise(columns)
    found = with_grads(lambda *x: (gated_norm(*x, 1e-5),), *given)
    exact = with_grads(lambda *x: (gated_norm_reference(*x, 1e-5),), *(x.double() for x in given))
    for own, other in zip(found, exact, strict=True):
        assert_close("gated_norm", own, other, TOLERANCE[dtype])


@pytest.mark.usefixtures("cpu_form")
def test_rows_may_lie_apart():
    torch.manual_seed(0)
    wide = noise(70, 200)
    assert torch.equal(
        rms_norm(wide[:, 50:150], torch.ones(100), 1e-5),
        rms_norm(wide[:, 50:150].contiguous(), torch.ones(100), 1e-5),
    )


def every_op(dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of all that the passes compute."""
    torch.manual_seed(0)
    rows, branch, gate = (noise(300, 96, dtype=dtype) for _ in range(3))
    found = with_grads(lambda *x: join_norm(*x, 1e-5, gain=(1.5, 0.7)), rows, branch, noise(96))
    found += with_grads(lambda *x: (gated_norm(*x, 1e-5),), rows, gate, noise(96))
    found += with_grads(lambda x: silu_qkv(x, 2), rows)
    states = noise(2, 3, 32, 32)
    qkv = [noise(300, 3, 32, dtype=dtype) for _ in range(3)]
    slopes = torch.tensor([0.5, 0.1, 0.0])

    def lightning(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        options = {"initial_state": state, "with_final": True}
        return lightning_attention(q, k, v, slopes, [201, 99], **options)

    found += with_grads(lightning, *qkv, states)
    keys, values = (noise(300, 2, 32, dtype=dtype) for _ in range(2))
    found += with_grads(
        lambda *x: (packed_attention(*x, [201, 99], window=150),),
        noise(300, 4, 32, dtype=dtype), keys, values,
    )  # fmt: skip
    chosen = torch.rand(300, 4).argsort(-1)[:, :2]
    weights = noise(4, 128, 96, dtype=dtype), noise(4, 96, 64, dtype=dtype)
    found += with_grads(
        lambda x, up, down, share: (expert_layer(x, up, down, chosen, share),),
        rows, *weights, torch.rand(300, 2),
    )  # fmt: skip
    return found


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype):
    for one, other in zip(every_op(dtype), every_op(dtype), strict=True):
        assert torch.equal(one, other)


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit_of_a_pass(dtype: torch.dtype, threads: Callable[[int], None]):
    inner, back = noise(300, 192, dtype=dtype), noise(300, 96, dtype=dtype)
    scale, row = torch.rand(300, 1).to(dtype), torch.randint(40, (300,))
    found = []
    for count in (1, 3):
        threads(count)
        total = torch.zeros(40, 96, dtype=dtype)
        passes.add_rows(total, row, back, scale)
        norm = with_grads(lambda *x: (gated_norm(*x, 1e-5),), back, inner[:, :96], torch.ones(96))
        heads = inner.view(300, 6, 32)
        attended = with_grads(
            lambda *x: (packed_attention(*x, [201, 99]),), heads[:, :4], heads[:, 4:], heads[:, 2:4]
        )
        passed = passes.swiglu(inner), *passes.swiglu_grad(inner, back.clone(), scale), total
        found.append([*passed, *norm, *attended])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@built
def test_a_lightning_sequence_has_the_bits_it_has_alone():
    torch.manual_seed(0)
    q, k, v = (noise(170, 3, 40) for _ in range(3))
    slopes = torch.tensor([0.5, 0.1, 0.0])
    packed, _ = lightning_attention(q, k, v, slopes, [33, 1, 136])
    alone, _ = lightning_attention(q[34:], k[34:], v[34:], slopes, [136])
    assert torch.equal(packed[34:], alone)


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_document_has_the_bits_of_softmax_attention_that_it_has_alone(dtype: torch.dtype):
    torch.manual_seed(0)
    given = [noise(170, heads, 40, dtype=dtype) for heads in (4, 2, 2)]
    leaves = [x.clone().requires_grad_() for x in given]
    grad = noise(170, 4, 40, dtype=dtype)
    packed = packed_attention(*leaves, [33, 1, 136])
    together = packed, *torch.autograd.grad(packed, leaves, grad)
    own = [x[34:].clone().requires_grad_() for x in given]
    alone = packed_attention(*own, [136])
    apart = alone, *torch.autograd.grad(alone, own, grad[34:])
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one[34:], other)


@built
def test_rows_that_go_to_one_place_are_added_in_order():
    total = torch.zeros(2, 40)
    row, x = torch.tensor([1, 1, 0, 1]), noise(4, 40)
    passes.add_rows(total, row, x, torch.tensor([[2.0], [0.5], [1.0], [4.0]]))
    assert torch.equal(total[0], x[2])
    assert_close("sum", total[1], 2 * x[0] + 0.5 * x[1] + 4 * x[3], 1e-6)


@pytest.mark.usefixtures("cpu_form")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(dtype: torch.dtype, value: float):
    x = torch.ones(70, 96, dtype=dtype)
    x[3, 5] = value
    weights = torch.ones(1, 2 * 8, 96, dtype=dtype), torch.ones(1, 96, 8, dtype=dtype)
    chosen, share = torch.zeros(70, 1, dtype=torch.int64), torch.ones(70, 1)
    q, k, v = silu_qkv(x, 1)
    attended, _ = lightning_attention(
        q[:, None, 0], k[:, None, 0], v[:, None, 0], torch.zeros(1), [70]
    )
    for found in (
        rms_norm(x, torch.ones(96), 1e-5)[3],
        expert_layer(x, *weights, chosen, share)[3],
        q[3],
        attended[3:],
    ):
        assert not torch.isfinite(found).all()
    assert torch.isfinite(rms_norm(x, torch.ones(96), 1e-5)[4]).all()
    assert torch.isfinite(attended[:3]).all()


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_not_finite_shows_in_softmax_attention(
    which: str, value: float, dtype: torch.dtype
):
    # torch's own kernel gives zeros for an infinite bf16 score
    rows = {name: torch.ones(70, 1, 32, dtype=dtype) for name in "qkv"}
    rows[which][40, 0, 5] = value
    found = packed_attention(*rows.values(), [35, 35])
    assert not torch.isfinite(found[40]).all()
    assert torch.isfinite(found[:35]).all()


@built
def test_sigmoid_is_exact_to_fp32_and_ends_at_its_edges():
    gate = torch.cat([torch.linspace(-60, 60, 10_000), torch.tensor([-math.inf, -90, 90, 1e30])])
    found = passes.swiglu(torch.stack([gate, torch.ones_like(gate)], dim=1))[:, 0]
    expected = torch.nn.functional.silu(gate.double())
    finite = gate > -80
    error = (found[finite] - expected[finite]).abs() / expected[finite].abs().clamp(min=1e-30)
    assert float(error.max()) < 1e-6
    assert float(found[-3].abs()) < 1e-30


def test_without_what_was_built_nothing_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    passes.library.cache_clear()
    assert not passes.takes(torch.ones(1))
    passes.library.cache_clear()


@built
def test_other_dtypes_and_devices_are_left_to_torch():
    assert passes.takes(torch.ones(1), torch.ones(1).bfloat16(), None)
    for other in (torch.ones(1).double(), torch.ones(1).half(), torch.ones(1, device="meta")):
        assert not passes.takes(other)
