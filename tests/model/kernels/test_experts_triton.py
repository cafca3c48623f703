"""The kernels of the experts against the definition: interpreted on a CPU, compiled ahead, and run.

Interpreted products keep fp32; bf16 products are not interpreted, so 16 bits are checked as fp16.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.kernels.experts import places
from model.kernels.experts.blocks import expert_layer_blocks
from model.kernels.experts.reference import experts_reference
from model.kernels.experts.router import router_logits
from tests.helpers import assert_close, slow
from tests.model.kernels import formula

ROOT = Path(__file__).parents[3]
BOUND = formula.BOUND
CUDA = formula.CUDA
DEVICE = formula.DEVICE


@pytest.fixture(scope="module")
def launch() -> ModuleType:
    return formula.launch("experts")


@pytest.fixture(autouse=True)
def _poison_products(poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = torch._grouped_mm

    def product(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        out = grouped(left, right, offs=offs)
        # rows after the last are left as they were
        if right.ndim == 3:
            out[int(offs[-1]) :] = float("nan")
        return out

    monkeypatch.setattr(torch, "_grouped_mm", product)


class Case:
    """Random tensors and places of one layer; `run` gives the output and every gradient.

    Args:
        loads: `any`: as drawn; `one`: every token chose the same experts; `dropped`: a fifth of the
            places and one whole token.
    """

    def __init__(
        self, tokens: int, experts: int, top: int, dtype: torch.dtype, *,
        size: int = 24, inner: int = 16, loads: str = "any", seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(tokens + experts + 10_000 * seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.dtype = dtype
        self.tensors = {
            "x": noise(tokens, size).to(dtype),
            "gate_up": (noise(experts, 2 * inner, size) * size**-0.5).to(dtype),
            "down": (noise(experts, size, inner) * inner**-0.5).to(dtype),
            "weights": torch.rand(tokens, top, generator=generator),
        }
        self.chosen = noise(tokens, experts).argsort(dim=-1)[:, :top]
        if loads == "one":
            self.chosen = torch.arange(experts - top, experts).expand(tokens, top).clone()
        if loads == "dropped":
            self.chosen[torch.rand(tokens, top, generator=generator) < 0.2] = experts
            self.chosen[tokens // 2] = experts
        self.dy = noise(tokens, size).to(dtype)

    def run(self, form: object, device: str, *, wide: bool) -> dict[str, Tensor]:
        place = {"device": device, "dtype": torch.float64} if wide else {"device": device}
        leaves = {k: leaf(v, **place) for k, v in self.tensors.items()}
        x, gate_up, down, weights = leaves.values()
        out = form(x, gate_up, down, self.chosen.to(device), weights)
        out.backward(self.dy.to(**place))
        return {"output": out.detach(), **{f"d{name}": x.grad for name, x in leaves.items()}}


def leaf(x: Tensor, **place: object) -> Tensor:
    return x.detach().to(**place, copy=True).requires_grad_()


def check(launch: ModuleType, *cases: Case) -> None:
    """Errors over all cases together: one token's two weights alone may nearly cancel."""
    found = [case.run(launch.expert_layer_triton, DEVICE, wide=False) for case in cases]
    # the definition takes minutes for many tokens; that of the CPU was held to it
    form = _defined if len(cases[0].chosen) <= 65 else expert_layer_blocks
    exact = [case.run(form, "cpu", wide=True) for case in cases]
    dtype = cases[0].dtype
    for name in exact[0]:
        mine, other = (torch.cat([run[name].cpu() for run in runs]) for runs in (found, exact))
        assert mine.dtype == (torch.float32 if name == "dweights" else dtype)
        assert_close(name, mine, other, BOUND[dtype])


def _defined(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The definition, a dropped place as one of weight 0 that passes no gradient."""
    kept = chosen < len(gate_up)
    return experts_reference(x, gate_up, down, chosen * kept, weights * kept)


@pytest.mark.parametrize("tokens", [1, *slow(63, 64, 65)])
def test_any_number_of_tokens(launch: ModuleType, tokens: int):
    check(launch, Case(tokens, 5, 2, torch.float32))


@pytest.mark.parametrize(
    ("loads", "dtype"),
    [
        ("dropped", torch.float16),
        *slow(("one", torch.float32), ("one", torch.float16), ("dropped", torch.float32)),
    ],
)
def test_ragged_loads(launch: ModuleType, loads: str, dtype: torch.dtype):
    check(launch, Case(33, 4, 2, dtype, loads=loads))


@pytest.mark.parametrize(("size", "inner"), [(7, 5), *slow((33, 70))])
def test_odd_sizes(launch: ModuleType, size: int, inner: int):
    check(launch, Case(20, 3, 3, torch.float32, size=size, inner=inner))


def test_more_experts_than_places(launch: ModuleType):
    check(launch, Case(3, 70, 2, torch.float32))


def test_columns_beyond_one_program(launch: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "MAX_COLUMNS", 16)
    check(launch, Case(9, 3, 2, torch.float32, size=40, inner=56))


@pytest.mark.skipif(CUDA, reason="the matrix below runs the same where it is the product's own")
def test_layer_by_the_products_of_hopper(launch: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_has_kernel", lambda *_: True)
    check(launch, Case(40, 4, 2, torch.float32, size=32, inner=48, loads="dropped"))


def test_every_place_dropped_gives_zeros(launch: ModuleType):
    case = Case(5, 3, 2, torch.float32)
    case.chosen.fill_(3)
    for name, value in case.run(launch.expert_layer_triton, DEVICE, wide=False).items():
        assert torch.equal(value, torch.zeros_like(value)), name


def test_rows_lie_by_expert_in_the_order_of_places(launch: ModuleType):
    # several blocks of the counting sort
    chosen = torch.randint(0, 6, (1500, 2), generator=torch.Generator().manual_seed(0))
    places = launch.sort_places(chosen.to(DEVICE), 5)
    flat = chosen.flatten()
    kept = (flat < 5).nonzero()[:, 0]
    order = kept[flat[kept].argsort(stable=True)]
    assert places.ends.tolist() == flat.bincount(minlength=6)[:5].cumsum(0).tolist()
    assert torch.equal(places.place[: len(order)].cpu().long(), order)
    assert torch.equal(places.position.cpu()[order].long(), torch.arange(len(order)))
    assert torch.equal(places.position.cpu() < 0, flat == 5)


def test_only_wanted_gradients_are_made(launch: ModuleType, monkeypatch: pytest.MonkeyPatch):
    case = Case(6, 3, 2, torch.float32)
    tensors = {k: v.to(DEVICE) for k, v in case.tensors.items()}
    tensors["x"] = leaf(case.tensors["x"], device=DEVICE)

    def unwanted(*_: Tensor) -> Tensor:
        raise AssertionError("frozen experts need no weight gradient")

    monkeypatch.setattr(launch, "weight_grad", unwanted)
    x, gate_up, down, weights = tensors.values()
    out = launch.expert_layer_triton(x, gate_up, down, case.chosen.to(DEVICE), weights)
    out.backward(case.dy.to(DEVICE))
    exact = case.run(_defined, "cpu", wide=True)
    assert_close("dx", x.grad.cpu(), exact["dx"], 1e-5)


@pytest.mark.parametrize(("tokens", "experts", "top"), [(1, 2, 1), (65, 5, 3), *slow((300, 32, 2))])
def test_places_are_those_of_torch(launch: ModuleType, tokens: int, experts: int, top: int):
    """As rows that travel to shared experts are sorted, spread and summed; some are dropped."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(experts + 1, (tokens, top), generator=generator)
    x = torch.randn(tokens, 40, generator=generator)
    exact = places.sort_places(chosen, experts)
    found = launch.sort_places(chosen.to(DEVICE), experts)
    count = int(exact.ends[-1])
    assert torch.equal(found.ends.cpu(), exact.ends)
    assert torch.equal(found.position.cpu(), exact.position)
    assert torch.equal(found.place[:count].cpu(), exact.place[:count])
    rows = launch.spread(x.to(DEVICE), found.position)[:count]
    wanted = places.spread(x, exact)[:count]
    assert torch.equal(rows.cpu(), wanted)
    summed = launch.combine(rows, found.position, None, tokens)
    assert_close("summed", summed.cpu(), places.combine(wanted, exact, tokens), 1e-6)


@pytest.mark.parametrize(("tokens", "experts", "top"), [(1, 2, 1), (65, 5, 3), (300, 32, 2)])
def test_routing_equals_torch(launch: ModuleType, tokens: int, experts: int, top: int):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, experts, generator=generator)
    dweights = torch.randn(tokens, top, generator=generator)
    found, exact = leaf(logits, device=DEVICE), leaf(logits, dtype=torch.float64)
    weights, chosen = launch.route_triton(found, top)
    values, expected = exact.topk(top, dim=-1)
    assert torch.equal(chosen.cpu(), expected)
    assert_close("weights", weights.detach().cpu(), values.softmax(-1).detach(), 1e-6)
    weights.backward(dweights.to(DEVICE))
    values.softmax(-1).backward(dweights.double())
    assert_close("dlogits", found.grad.cpu(), exact.grad, 1e-5)


def test_routing_shows_what_is_not_a_number(launch: ModuleType):
    logits = torch.tensor([[0.0, float("nan"), 1.0]], device=DEVICE)
    weights, chosen = launch.route_triton(logits, 2)
    assert chosen[0, 0] == 1
    assert torch.isnan(weights).any()


def test_selective_checkpointing_sees_the_products(
    launch: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    # what is kept must not be written to, not even by the poison
    monkeypatch.undo()
    monkeypatch.setattr(launch, "_has_kernel", lambda *_: True)
    seen = []

    def policy(context: object, op: object, *_: object, **__: object) -> CheckpointPolicy:
        if op == torch.ops.aten._grouped_mm.default:
            seen.append(op)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    case = Case(20, 4, 2, torch.bfloat16 if CUDA else torch.float32, size=16, inner=8)

    def kept(*tensors: Tensor) -> Tensor:
        return checkpoint(
            launch.expert_layer_triton, *tensors, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )  # fmt: skip

    found = case.run(kept, DEVICE, wide=False)
    assert seen
    for name, value in case.run(launch.expert_layer_triton, DEVICE, wide=False).items():
        assert torch.equal(found[name], value), name


# few shapes, because each is compiled for itself
MATRIX = [
    (torch.bfloat16, 128, 64, 8, 2),
    (torch.bfloat16, 200, 72, 33, 3),
    (torch.bfloat16, 33, 70, 8, 2),
    (torch.float16, 128, 64, 8, 2),
    (torch.float32, 33, 70, 33, 3),
]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("loads", ["any", "one", "dropped"])
@pytest.mark.parametrize(("dtype", "size", "inner", "experts", "top"), MATRIX, ids=str)
def test_the_whole_matrix(
    launch: ModuleType, loads: str, dtype: torch.dtype, size: int, inner: int, experts: int,
    top: int,
):  # fmt: skip
    for tokens in (1, 63, 64, 65, 1000):
        make = functools.partial(Case, tokens, experts, top, dtype, size=size, inner=inner)
        check(launch, *(make(loads=loads, seed=n) for n in range(16 if tokens == 1 else 1)))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_router_in_bf16_keeps_fp32(launch: ModuleType):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(1000, 512, generator=generator),
        torch.randn(8, 512, generator=generator),
    )
    dlogits = torch.randn(1000, 8, generator=generator)
    found = [y.bfloat16().cuda().requires_grad_() for y in (x, weight)]
    exact = [y.detach().cpu().double().requires_grad_() for y in found]
    logits, expected = router_logits(*found), router_logits(*exact)
    assert_close("logits", logits.detach().cpu(), expected.detach(), 1e-5)
    logits.backward(dlogits.cuda())
    expected.backward(dlogits.double())
    for name, mine, other in zip(("dx", "dweight"), found, exact, strict=True):
        # one rounding, that of the gradient itself
        assert_close(name, mine.grad.cpu(), other.grad, 2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_block_never_waits_for_the_device(launch: ModuleType, monkeypatch: pytest.MonkeyPatch):
    from model.config import HybridConfig
    from model.moe import MoE, balance_loss

    monkeypatch.undo()
    config = HybridConfig(
        hidden_size=256, intermediate_size=128, num_local_experts=8, expert_capacity_factor=1.0
    )
    block = MoE(config).cuda().bfloat16()
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, logits = block(x)
        (out.float().sum() + balance_loss([logits], 2)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x.grad).all()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_two_runs_give_the_same_bits(launch: ModuleType):
    case = Case(3000, 8, 2, torch.bfloat16, size=256, inner=128)
    first, second = (case.run(launch.expert_layer_triton, "cuda", wide=False) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
