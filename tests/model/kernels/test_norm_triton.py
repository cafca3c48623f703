"""RMSNorm, join and gate in their Triton form: interpreted on a CPU, or run on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.norm.reference import (
    gated_norm_reference,
    join_norm_reference,
    norm_reference,
)
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


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [32, 96, 128, 2048, 8192])
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
