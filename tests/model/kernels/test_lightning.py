from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.kernels.lightning.op import lightning_attention, lightning_step
from model.kernels.lightning.reference import lightning_reference
from tests.helpers import TOLERANCE, assert_close

pytestmark = pytest.mark.usefixtures("cpu_form")

RAGGED = ([1], [63], [64], [65], [1000], [65, 1, 130], [1, 1, 1], [33, 200, 1, 64])


def inputs(
    lengths: Sequence[int], *, heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    qkv = [torch.randn(sum(lengths), heads, dim, dtype=dtype) for _ in range(3)]
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
    state = torch.randn(len(lengths), heads, dim, dim)
    return qkv, slopes, state


def run(
    form: str, qkv: Sequence[Tensor], slopes: Tensor, lengths: Sequence[int], state: Tensor | None
) -> dict[str, Tensor]:
    """Output, final state and every gradient; both outputs weighted by fixed noise."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    start = None if state is None else state.detach().clone().requires_grad_()
    if form == "op":
        out, final = lightning_attention(
            *leaves, slopes, lengths, initial_state=start, with_final=True
        )
    else:
        out, final = lightning_reference(*leaves, slopes, lengths, initial_state=start)
    assert final is not None
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    final_weights = torch.randn(final.shape, generator=generator, dtype=torch.float64)
    ((out * weights).sum() + (final * final_weights).sum()).backward()
    found = {"output": out, "final": final}
    found |= {f"gradient of {n}": x.grad for n, x in zip("qkv", leaves, strict=True)}
    if start is not None:
        found["gradient of initial_state"] = start.grad
    return found


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("lengths", "heads", "dim"),
    [
        *((lengths, 3, 32) for lengths in RAGGED),
        ([63, 1], 1, 64),
        ([65, 2], 5, 128),
    ],
)
def test_equals_the_recurrence(lengths: list[int], heads: int, dim: int, with_state: bool):
    qkv, slopes, state = inputs(lengths, heads=heads, dim=dim)
    start = state if with_state else None
    found = run("op", qkv, slopes, lengths, start)
    exact = run(
        "reference",
        [x.double() for x in qkv],
        slopes.double(),
        lengths,
        None if start is None else start.double(),
    )
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert_close(name, found[name], value, 1e-6)


def test_float64_is_computed_in_float64():
    lengths = [65, 1, 40]
    qkv, slopes, state = inputs(lengths, heads=3, dim=16, dtype=torch.float64)
    found = run("op", qkv, slopes.double(), lengths, state.double())
    exact = run("reference", qkv, slopes.double(), lengths, state.double())
    for name, value in exact.items():
        assert_close(name, found[name], value, TOLERANCE[torch.float64])


def test_bfloat16_rounds_inputs_and_output_only():
    lengths = [300, 1]
    qkv, slopes, state = inputs(lengths, heads=3, dim=32, dtype=torch.bfloat16)
    out, final = lightning_attention(*qkv, slopes, lengths, initial_state=state, with_final=True)
    wide = [x.double() for x in qkv]
    expected, state = lightning_reference(
        *wide, slopes.double(), lengths, initial_state=state.double()
    )
    assert out.dtype == torch.bfloat16
    assert final is not None
    assert final.dtype == torch.float32
    assert_close("output", out, expected.bfloat16(), 1e-3)
    assert_close("final", final, state, 1e-6)


@pytest.mark.parametrize("slope", [0.0, 1e-5, 1.0, 60.0])
def test_no_slope_overflows(slope: float):
    lengths = [500, 3]
    qkv, _, state = inputs(lengths, heads=1, dim=32)
    slopes = torch.full((1,), slope)
    found = run("op", qkv, slopes, lengths, state)
    exact = run("reference", [x.double() for x in qkv], slopes.double(), lengths, state.double())
    for name, value in exact.items():
        assert_close(name, found[name], value, 1e-6)


@pytest.mark.parametrize("cut", [1, 31, 32, 64, 99])
def test_final_state_continues_the_sequence(cut: int):
    qkv, slopes, _ = inputs([100], heads=3, dim=32)
    whole, final = lightning_attention(*qkv, slopes, [100], with_final=True)
    first, state = lightning_attention(*(x[:cut] for x in qkv), slopes, [cut], with_final=True)
    second, last = lightning_attention(
        *(x[cut:] for x in qkv), slopes, [100 - cut], initial_state=state, with_final=True
    )
    assert final is not None
    assert last is not None
    assert_close("output", torch.cat((first, second)), whole, 1e-6)
    assert_close("final", last, final, 1e-6)


def test_decay_restarts_at_each_sequence():
    qkv, slopes, _ = inputs([50, 30], heads=3, dim=32)
    together = lightning_attention(*qkv, slopes, [50, 30])[0]
    apart = [lightning_attention(*(x[s] for x in qkv), slopes, [n])[0]
             for s, n in ((slice(50), 50), (slice(50, 80), 30))]  # fmt: skip
    assert_close("output", together, torch.cat(apart), 1e-6)


def test_shapes_that_do_not_fit_are_refused():
    (q, k, v), slopes, state = inputs([4], heads=2, dim=8)
    with pytest.raises(ValueError, match=r"expected q, k, v alike \[T, H, D\]"):
        lightning_attention(q, k[:3], v, slopes, [4])
    with pytest.raises(ValueError, match=r"lengths \(3,\) must be >= 1 each and sum to T = 4"):
        lightning_attention(q, k, v, slopes, [3])
    with pytest.raises(ValueError, match=r"initial_state .* expected \(1, 2, 8, 8\)"):
        lightning_attention(q, k, v, slopes, [4], initial_state=state[:, :1])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 32, 33, 128])
def test_step_updates_its_slots_in_place(dim: int, dtype: torch.dtype):
    qkv, slopes, _ = inputs([9], heads=3, dim=dim, dtype=dtype)
    # heads outermost in memory, as a layer gives them
    qkv = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv]
    states, index = torch.randn(12, 3, dim, dim), torch.tensor([3, 0, 11, 7, 1, 2, 10, 4, 6])
    before = states.clone()
    out = lightning_step(*qkv, slopes, states, index)
    expected, new = lightning_reference(
        *(x.double() for x in qkv), slopes, [1] * 9, initial_state=before[index].double()
    )
    assert out.dtype == dtype
    assert_close("output", out, expected, TOLERANCE[dtype])
    assert_close("state", states[index], new, 1e-6)
    assert torch.equal(states[[5, 8, 9]], before[[5, 8, 9]])
    alone = before.clone()
    own = lightning_step(*(x[4:5] for x in qkv), slopes, alone, index[4:5])
    assert torch.equal(own[0], out[4])
    assert torch.equal(alone[1], states[1])


@pytest.mark.parametrize("slot", [-1, 4])
def test_a_slot_that_is_not_there_is_refused(slot: int):
    q = torch.zeros(2, 3, 8)
    with pytest.raises(
        (ValueError, IndexError), match=r"expected slots 0 to 3|out of range|bounds"
    ):
        lightning_step(q, q, q, torch.zeros(3), torch.zeros(4, 3, 8, 8), torch.tensor([0, slot]))
