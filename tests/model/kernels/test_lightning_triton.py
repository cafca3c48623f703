"""The Triton form against the recurrence: interpreted on a CPU, compiled ahead for GPUs, and run.

Interpreted products keep fp32; bf16 products are not interpreted, so 16 bits are checked as fp16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.kernels.lightning import op, plan
from model.kernels.lightning.reference import lightning_reference
from tests.helpers import assert_close, slow
from tests.model.kernels import formula

ROOT = Path(__file__).parents[3]
BOUND = formula.BOUND
RAGGED = ([1], [63], [64], [65], [1000], [65, 1, 130], [1, 1, 1], [33, 200, 1, 64])
CUDA = formula.CUDA


pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(scope="module")
def launch() -> ModuleType:
    return formula.launch("lightning")


class Case:
    """Random inputs and what to weigh the outputs with; `run` gives outputs and gradients."""

    def __init__(
        self, lengths: Sequence[int], heads: int, dim: int, dtype: torch.dtype, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        total, count = sum(lengths), len(lengths)
        self.lengths = list(lengths)
        # one tensor [T, H, 3D], as the layer makes it: q, k and v are strided views
        self.qkv = (noise(total, heads, 3 * dim) * dim**-0.5).to(dtype)
        self.weights = noise(total, heads, dim).to(dtype)
        self.slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        self.state = noise(count, heads, dim, dim)
        self.final_weights = noise(count, heads, dim, dim)

    def run(
        self, form: object, device: str, *, initial: bool, final: bool, wide: bool = False
    ) -> dict[str, Tensor]:
        place = {"device": device, "dtype": torch.float64} if wide else {"device": device}
        qkv = self.qkv.detach().to(**place, copy=True).requires_grad_()
        start = self.state.detach().to(**place, copy=True).requires_grad_() if initial else None
        options = {} if wide else {"with_final": final}
        out, last = form(
            *qkv.chunk(3, dim=-1), self.slopes.to(**place), self.lengths,
            initial_state=start, **options,
        )  # fmt: skip
        weighed = (out * self.weights.to(**place)).sum()
        found = {"output": out}
        if final:
            weighed = weighed + (last * self.final_weights.to(**place)).sum()
            found["final"] = last
        weighed.backward()
        found |= dict(zip(("dq", "dk", "dv"), qkv.grad.chunk(3, dim=-1), strict=True))
        if start is not None:
            found["dinitial"] = start.grad
        return found


def check(launch: ModuleType, case: Case, *, initial: bool, final: bool) -> None:
    found = case.run(
        launch.lightning_triton, "cuda" if CUDA else "cpu", initial=initial, final=final
    )
    exact = case.run(lightning_reference, "cpu", initial=initial, final=final, wide=True)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert_close(name, found[name].cpu(), value, BOUND[case.qkv.dtype])


@pytest.fixture
def cut(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for many programs, so that short sequences too are cut into segments with carries."""
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 12)
    monkeypatch.setattr(plan, "SEGMENT_COST", 0)


@pytest.mark.parametrize("is_split", [False, True])
def test_short_sequences_are_cut(is_split: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "SEGMENT_COST", 0)
    work = plan.plan_work(
        (33, 1, 150), heads=3, programs=24, chunk_tokens=16, is_split=is_split,
        device=torch.device("cpu"),
    )  # fmt: skip
    for direction in (work.forward, work.backward):
        assert direction.num_carries >= 3
        assert direction.carries[:, 3].any()
        chunks = [range(low, high) for low, high in direction.segments[:, :2].tolist()]
        assert sorted(chunk for run in chunks for chunk in run) == list(range(len(work.chunks)))


# with neither: below
@pytest.mark.parametrize(
    ("initial", "final"),
    [(True, False), *slow((False, False), (False, True), (True, True))],
)
def test_outputs_and_gradients_equal_the_recurrence(
    launch: ModuleType, cut: None, initial: bool, final: bool
):
    case = Case([33, 1, 150], 3, 16, torch.float32)
    check(launch, case, initial=initial, final=final)


@pytest.mark.parametrize("lengths", [[1], [64], [65], [1, 1, 1], [170]])
def test_any_length(launch: ModuleType, cut: None, lengths: list[int]):
    check(launch, Case(lengths, 1, 16, torch.float32), initial=False, final=False)


@pytest.mark.parametrize("dim", [24, *slow(8, 64)])
def test_any_head_size(launch: ModuleType, cut: None, dim: int):
    check(launch, Case([70, 3], 1, dim, torch.float32), initial=True, final=True)


@pytest.mark.parametrize(("initial", "final"), [(True, True), *slow((False, False))])
def test_half_precision_products(launch: ModuleType, cut: None, initial: bool, final: bool):
    check(launch, Case([40, 1, 300], 2, 32, torch.float16), initial=initial, final=final)


@pytest.mark.parametrize("slope", [60.0, *slow(0.0, 1e-5)])
def test_no_slope_overflows(launch: ModuleType, cut: None, slope: float):
    case = Case([200, 3], 1, 16, torch.float32)
    case.slopes = torch.full((1,), slope)
    check(launch, case, initial=False, final=False)


@pytest.mark.slow
def test_a_state_that_faded_is_not_read(launch: ModuleType, cut: None):
    case = Case([350], 1, 16, torch.float32)
    case.slopes = torch.full((1,), 0.4)
    check(launch, case, initial=False, final=False)


def test_step_updates_its_slots_only(launch: ModuleType):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 24, generator=generator)
    slopes, index = torch.tensor([0.5, 0.1, 0.0]), torch.tensor([4, 1])
    states = torch.randn(5, 3, 24, 24, generator=generator)
    device = "cuda" if CUDA else "cpu"
    found = states.clone().to(device)
    out = launch.lightning_step_triton(*(x.to(device) for x in (q, k, v, slopes, found, index)))
    expected, new = lightning_reference(
        *(x.double() for x in (q, k, v, slopes)), [1, 1], initial_state=states[index].double()
    )
    assert_close("output", out.cpu(), expected, 1e-6)
    assert_close("state", found[index].cpu(), new, 1e-6)
    assert torch.equal(found[[0, 2, 3]].cpu(), states[[0, 2, 3]])


def check_piece(form: Callable[..., Tensor], count: int, dim: int, dtype: torch.dtype) -> None:
    """The first `count` of 130 rows, against the recurrence; rows behind hold anything finite."""
    generator = torch.Generator().manual_seed(count)
    device = "cuda" if CUDA else "cpu"
    qkv = (torch.randn(130, 3, 3 * dim, generator=generator) * dim**-0.5).to(dtype)
    slopes = torch.tensor([0.5, 0.1, 0.0])
    states = torch.randn(5, 3, dim, dim, generator=generator)
    found, rows = states.clone().to(device), plan.FirstRows(
        torch.tensor([4], device=device), torch.tensor([count], device=device)
    )  # fmt: skip
    out = form(*qkv.to(device).chunk(3, dim=-1), slopes.to(device), found, rows)
    expected, new = lightning_reference(
        *qkv[:count].double().chunk(3, dim=-1), slopes.double(), [count],
        initial_state=states[4:].double(),
    )  # fmt: skip
    assert_close("output", out[:count].cpu(), expected, BOUND[dtype])
    assert not out[count:].any()
    assert_close("state", found[4:].cpu(), new, BOUND[dtype])
    assert torch.equal(found[:4].cpu(), states[:4])


COUNTS = (1, 16, 17, 64, 65, 128, 129, 130)


@pytest.mark.parametrize("count", COUNTS)
def test_a_piece_in_a_slot_is_the_recurrence(launch: ModuleType, count: int):
    check_piece(launch.lightning_piece_triton, count, 24, torch.float32)
    if not CUDA:
        check_piece(op.lightning_piece, count, 24, torch.float32)


def test_step_in_torch_equals_the_recurrence():
    q, k, v = torch.randn(3, 2, 3, 8)
    states, index = torch.randn(4, 3, 8, 8), torch.tensor([3, 0])
    slopes, before = torch.tensor([0.5, 0.1, 0.0]), states.clone()
    out = op.lightning_step(q, k, v, slopes, states, index)
    expected, new = lightning_reference(q, k, v, slopes, [1, 1], initial_state=before[index])
    assert_close("output", out, expected, 1e-6)
    assert_close("state", states[index], new, 1e-6)
    assert torch.equal(states[[1, 2]], before[[1, 2]])


def test_arguments_that_do_not_fit_are_refused():
    q = torch.zeros(2, 3, 8)
    slopes, states, index = torch.zeros(3), torch.zeros(4, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"k torch\.bfloat16.*expected one dtype"):
        op.lightning_attention(q, q.bfloat16(), q, slopes, [2])
    with pytest.raises(ValueError, match="slopes on meta: expected one device"):
        op.lightning_attention(q, q, q, slopes.to("meta"), [2])
    with pytest.raises(ValueError, match="initial_state is on meta, q on cpu"):
        op.lightning_attention(q, q, q, slopes, [2], initial_state=states[:1].to("meta"))
    with pytest.raises(ValueError, match=r"expected \[N, 3, 8, 8\] and \[2\]"):
        op.lightning_step(q, q, q, slopes, states[:, :2], index)
    with pytest.raises(ValueError, match="states on meta, index on cpu, q on cpu"):
        op.lightning_step(q, q, q, slopes, states.to("meta"), index)
    with pytest.raises(ValueError, match=r"index \(2,\): expected \[N, 3, 8, 8\] and \[1\]"):
        op.lightning_piece(q, q, q, slopes, states, plan.FirstRows(index, index[:1]))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", RAGGED)
# what is compiled varies slowest: workers then take whole columns, and compile each once
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_the_whole_matrix(launch: ModuleType, lengths: list[int], dim: int, dtype: torch.dtype):
    for heads, states in ((1, False), (3, True)):
        check(launch, Case(lengths, heads, dim, dtype), initial=states, final=states)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_pieces_of_every_kernel(launch: ModuleType, dim: int, dtype: torch.dtype):
    for count in COUNTS:
        check_piece(launch.lightning_piece_triton, count, dim, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_slow_decay_over_100k_tokens(launch: ModuleType):
    from model.kernels.lightning.blocks import lightning_blocks

    case = Case([100_000, 1], 2, 128, torch.bfloat16)
    case.slopes = torch.tensor([1e-5, 0.0])
    found = case.run(launch.lightning_triton, "cuda", initial=True, final=True)
    blocks = functools.partial(lightning_blocks, with_final=True)
    exact = case.run(blocks, "cuda", initial=True, final=True, wide=True)
    for name, value in exact.items():
        assert_close(name, found[name], value, BOUND[torch.bfloat16])
