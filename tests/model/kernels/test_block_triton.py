"""Norms, rotary and silu of a block in their Triton form: interpreted on a CPU, or run on a GPU.

Every output and every gradient is held to the formulas in fp64, by RMS ratio.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.config import preset
from model.hybrid import HybridForCausalLM
from model.kernels.norm import op as norm_op
from model.kernels.norm.reference import (
    gated_norm_reference,
    join_norm_reference,
    norm_reference,
)
from model.kernels.qkv import op as qkv_op
from model.kernels.qkv.reference import silu_qkv_reference
from model.kernels.rotary import op as rotary_op
from model.kernels.rotary.reference import rotate_reference
from model.packed import Packed
from model.rotary import rotary_angles
from tests.helpers import assert_close

BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
EPS = 1e-6
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
"""A process interprets or compiles, not both (`tests/conftest.py`); a GPU, if any, runs all."""


def launch(room: str) -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module(f"model.kernels.{room}.launch")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor made without values starts as NaN, so that an unwritten element shows."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _nan(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _nan(empty_like(*a, **k)))


def _nan(x: Tensor) -> Tensor:
    # torch's checkpoint makes an empty one that wants a gradient
    is_value = x.is_floating_point() and x.numel() > 0
    return x.fill_(float("nan")) if is_value else x


Form = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass
class Case:
    """Tensors in the dtype of the kernel, and the same values for the formula in fp64.

    Args:
        inputs: those that get a gradient, by name; strides are kept.
        others: given behind them, without gradient: numbers, or tensors that stay as they are.
        options: given by keyword.
    """

    inputs: dict[str, Tensor]
    others: Sequence[object] = ()
    options: dict[str, object] | None = None

    def run(self, form: Form, device: str, *, wide: bool) -> dict[str, Tensor]:
        leaves = {name: _leaf(x, device, wide) for name, x in self.inputs.items()}
        others = [x.to(device) if isinstance(x, Tensor) else x for x in self.others]
        found = form(*leaves.values(), *others, **(self.options or {}))
        outputs = (found,) if isinstance(found, Tensor) else found
        generator = torch.Generator().manual_seed(7)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for out in outputs:
            # exact in every dtype here, so that both forms get the same gradient
            noise = torch.randn(out.shape, generator=generator).bfloat16()
            loss = loss + (out.double() * noise.to(device).double()).sum()
        loss.backward()
        results = {f"output {i}": out for i, out in enumerate(outputs)}
        return results | {f"gradient of {name}": x.grad for name, x in leaves.items()}


def _leaf(x: Tensor, device: str, wide: bool) -> Tensor:
    if wide:
        return x.detach().double().to(device).requires_grad_()
    # a view of a wider row keeps its strides
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return copy.copy_(x.detach()).requires_grad_()


def check(form: Form, exact: Form, case: Case) -> None:
    found = case.run(form, DEVICE, wide=False)
    expected = case.run(exact, "cpu", wide=True)
    dtype = next(iter(case.inputs.values())).dtype
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if float(value.detach().square().mean().sqrt()) < 1e-9:
            # one channel's norm is a constant: only rounding may be left of its gradient
            assert float(found[name].abs().max()) < 1e-3, name
            continue
        assert_close(name, found[name].cpu(), value, BOUND[dtype])


def noise(*shape: int, dtype: torch.dtype, seed: int, is_strided: bool = False) -> Tensor:
    """Random values; strided ones lie in rows that are 16 wider, behind the first 16."""
    generator = torch.Generator().manual_seed(seed)
    if not is_strided:
        return torch.randn(*shape, generator=generator).to(dtype)
    # 16 keeps what a kernel is compiled for: the matrix then compiles nothing twice
    wide = torch.randn(*shape[:-1], shape[-1] + 16, generator=generator)
    return wide.to(dtype)[..., 16:]


def norm_case(total: int, columns: int, dtype: torch.dtype, *, is_strided: bool = False) -> Case:
    x = noise(total, columns, dtype=dtype, seed=0, is_strided=is_strided)
    # rows of any size, as the sums that are normed have
    x.mul_(torch.logspace(-1, 1, total)[:, None].to(dtype))
    return Case({"x": x, "weight": noise(columns, dtype=dtype, seed=1)}, (EPS,))


def join_case(
    total: int,
    columns: int,
    dtype: torch.dtype,
    *,
    postnorm: bool,
    gain: tuple[float, float] | None = (1.7, 0.6),
    is_strided: bool = False,
) -> Case:
    """A gain of None is a case without a branch."""
    plain = norm_case(total, columns, dtype, is_strided=is_strided)
    options: dict[str, object] = {"postnorm": postnorm}
    if gain is None:
        return Case({"residual": plain.inputs["x"], **_weight(plain)}, (EPS,), options)
    branch = noise(total, columns, dtype=dtype, seed=2, is_strided=is_strided)
    inputs = {"residual": plain.inputs["x"], "branch": branch, **_weight(plain)}
    return Case(inputs, (EPS,), {**options, "gain": gain})


def _weight(case: Case) -> dict[str, Tensor]:
    return {"weight": case.inputs["weight"]}


def gate_case(total: int, columns: int, dtype: torch.dtype, *, is_strided: bool = False) -> Case:
    plain = norm_case(total, columns, dtype, is_strided=is_strided)
    gate = noise(total, columns, dtype=dtype, seed=3, is_strided=is_strided)
    return Case({"x": plain.inputs["x"], "gate": gate, **_weight(plain)}, (EPS,))


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


def join_without(residual: Tensor, weight: Tensor, eps: float, *, postnorm: bool) -> tuple:
    return join_norm_reference(residual, None, weight, eps, postnorm=postnorm)


def join_without_triton(residual: Tensor, weight: Tensor, eps: float, *, postnorm: bool) -> tuple:
    form = launch("norm").join_norm_triton
    return form(residual, None, weight, eps, postnorm=postnorm)


FAST = [
    (1, 96, torch.float32, False),
    (65, 32, torch.float32, False),
    (63, 128, torch.bfloat16, True),
    (5, 2048, torch.float16, False),
    (3, 2049, torch.float32, True),
    (3, 6144, torch.bfloat16, False),
]


@pytest.mark.parametrize(("total", "columns", "dtype", "is_strided"), FAST)
def test_norm(total: int, columns: int, dtype: torch.dtype, is_strided: bool):
    case = norm_case(total, columns, dtype, is_strided=is_strided)
    check(launch("norm").norm_triton, norm_reference, case)


@pytest.mark.parametrize("postnorm", [True, False])
@pytest.mark.parametrize(("total", "columns", "dtype", "is_strided"), FAST)
def test_join(total: int, columns: int, dtype: torch.dtype, is_strided: bool, postnorm: bool):
    case = join_case(total, columns, dtype, postnorm=postnorm, is_strided=is_strided)
    check(launch("norm").join_norm_triton, join_norm_reference, case)


@pytest.mark.parametrize("postnorm", [True, False])
def test_join_of_equal_gains_gives_both_sides_their_gradient(postnorm: bool):
    case = join_case(7, 96, torch.float32, postnorm=postnorm, gain=(1.5, 1.5))
    check(launch("norm").join_norm_triton, join_norm_reference, case)


@pytest.mark.parametrize("postnorm", [True, False])
def test_join_without_a_branch(postnorm: bool):
    case = join_case(7, 96, torch.float32, postnorm=postnorm, gain=None)
    check(join_without_triton, join_without, case)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("postnorm", [True, False])
def test_one_output_of_the_join_may_go_unused(postnorm: bool, which: int):
    case = join_case(7, 96, torch.float32, postnorm=postnorm)
    form = launch("norm").join_norm_triton
    if which == 0 and not postnorm:
        # what PreNorm carries on is not normed
        case.inputs.pop("weight")
        weight = torch.ones(96)

        def own(residual: Tensor, branch: Tensor, eps: float, **options: object) -> Tensor:
            device, dtype = residual.device, residual.dtype
            return form(residual, branch, weight.to(device, dtype), eps, **options)[0]

        def exact(residual: Tensor, branch: Tensor, eps: float, **options: object) -> Tensor:
            return join_norm_reference(residual, branch, weight.double(), eps, **options)[0]

        check(own, exact, case)
        return
    check(
        lambda *a, **k: form(*a, **k)[which],
        lambda *a, **k: join_norm_reference(*a, **k)[which],
        case,
    )


def test_join_of_a_narrow_branch_keeps_the_wide_dtype():
    case = join_case(7, 96, torch.float32, postnorm=True)
    case.inputs["branch"] = case.inputs["branch"].bfloat16()
    found = case.run(launch("norm").join_norm_triton, DEVICE, wide=False)
    expected = case.run(join_norm_reference, "cpu", wide=True)
    assert found["output 1"].dtype == torch.float32
    assert found["gradient of branch"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert_close(name, found[name].cpu(), value, 5e-3 if name.endswith("branch") else 1e-5)


@pytest.mark.parametrize(("total", "columns", "dtype", "is_strided"), FAST)
def test_gate(total: int, columns: int, dtype: torch.dtype, is_strided: bool):
    case = gate_case(total, columns, dtype, is_strided=is_strided)
    check(launch("norm").gated_norm_triton, gated_norm_reference, case)


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


@pytest.mark.parametrize("form", ["norm", "join", "gate"])
def test_gradients_are_the_same_every_time_and_frozen_weights_get_none(form: str):
    room = launch("norm")
    case = gate_case(64, 96, torch.float32)
    x, gate, weight = (t.to(DEVICE) for t in case.inputs.values())
    forms: dict[str, Form] = {
        "norm": lambda x, w: room.norm_triton(x, w, EPS),
        "join": lambda x, w: room.join_norm_triton(x, gate, w, EPS)[1],
        "gate": lambda x, w: room.gated_norm_triton(x, gate, w, EPS),
    }
    found = []
    for frozen in (False, False, True):
        leaf, own = x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        forms[form](leaf, own).square().sum().backward()
        found.append((leaf.grad, own.grad))
    assert torch.equal(found[0][1], found[1][1])
    assert all(torch.equal(found[0][0], other[0]) for other in found[1:])
    assert found[2][1] is None


def test_backward_keeps_inputs_and_one_number_a_row():
    case = gate_case(64, 96, torch.float32)
    x, gate, weight = (t.to(DEVICE).requires_grad_() for t in case.inputs.values())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        launch("norm").gated_norm_triton(x, gate, weight, EPS)
        launch("norm").join_norm_triton(x, gate, weight, EPS)
        launch("qkv").silu_qkv_triton(x, 1)
    inputs = {t.data_ptr() for t in (x, gate, weight)}
    made = [tuple(t.shape) for t in kept if t.data_ptr() not in inputs]
    assert made == [(64,), (64,)]


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


LENGTHS = (1, 63, 64, 65, 1000)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [32, 96, 128, 2048, 8192])
@pytest.mark.parametrize("total", LENGTHS)
def test_the_whole_matrix_of_norms(total: int, columns: int, dtype: torch.dtype):
    room = launch("norm")
    for is_strided in (False, True):
        options = {"is_strided": is_strided}
        check(room.norm_triton, norm_reference, norm_case(total, columns, dtype, **options))
        case = gate_case(total, columns, dtype, **options)
        check(room.gated_norm_triton, gated_norm_reference, case)
        for postnorm in (False, True):
            options["postnorm"] = postnorm
            case = join_case(total, columns, dtype, **options)
            check(room.join_norm_triton, join_norm_reference, case)
            case = join_case(total, columns, dtype, gain=None, **options)
            check(join_without_triton, join_without, case)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("total", LENGTHS)
def test_the_whole_matrix_of_heads(total: int, dim: int, dtype: torch.dtype):
    for is_strided in (False, True):
        case = qkv_case(total, 3, dim, dtype, is_strided=is_strided)
        check(launch("qkv").silu_qkv_triton, silu_qkv_reference, case)
        for turning in (dim // 2, dim):
            case = rotary_case(total, (5, 1), (dim, turning), dtype, is_strided=is_strided)
            check(launch("rotary").rotate_triton, rotate_both, case)
