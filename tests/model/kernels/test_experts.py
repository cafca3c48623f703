from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.experts import pieces
from model.kernels.experts.blocks import _extra_rows, least_rows
from model.kernels.experts.op import expert_layer
from model.kernels.experts.places import combine, sort_places, spread
from model.kernels.experts.reference import experts_reference
from model.kernels.experts.router import route, router_logits
from tests.helpers import TOLERANCE, assert_close

pytestmark = pytest.mark.usefixtures("cpu_form")


def inputs(tokens: int, experts: int, top: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    size, inner = 12, 10
    tensors = [
        torch.randn(tokens, size),
        torch.randn(experts, 2 * inner, size) * 0.3,
        torch.randn(experts, size, inner) * 0.3,
        torch.rand(tokens, top),
    ]
    chosen = torch.rand(tokens, experts).argsort(dim=-1)[:, :top]
    return tensors, chosen


def run(form: str, tensors: list[Tensor], chosen: Tensor) -> dict[str, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    x, gate_up, down, weights = leaves
    function = expert_layer if form == "op" else experts_reference
    out = function(x, gate_up, down, chosen, weights)
    (out * torch.linspace(0.5, 1.5, out.shape[1], dtype=torch.float64)).sum().backward()
    names = ("x", "gate_up", "down", "weights")
    grads = {f"gradient of {n}": leaf.grad for n, leaf in zip(names, leaves, strict=True)}
    return {"output": out, **grads}


@pytest.mark.parametrize(
    ("tokens", "experts", "top"), [(1, 4, 2), (63, 4, 2), (200, 8, 1), (65, 3, 3), (7, 32, 2)]
)
def test_equals_every_token_through_its_experts(tokens: int, experts: int, top: int):
    tensors, chosen = inputs(tokens, experts, top)
    found = run("op", tensors, chosen)
    exact = run("reference", [x.double() for x in tensors], chosen)
    for name, value in exact.items():
        assert_close(name, found[name], value, 1e-6)


def test_expert_without_a_token_has_a_zero_gradient():
    tensors, _ = inputs(9, 4, 2)
    found = run("op", tensors, torch.tensor([[0, 2]] * 9))
    assert float(found["gradient of gate_up"][1].abs().max()) == 0.0
    assert float(found["gradient of down"][3].abs().max()) == 0.0


def test_dropped_place_adds_nothing_and_gets_no_gradient():
    tensors, chosen = inputs(9, 4, 2)
    x, gate_up, down, weights = tensors
    dropped = chosen.clone()
    dropped[3, 1] = dropped[5, 0] = dropped[5, 1] = 4
    silent = weights.clone()
    silent[3, 1] = silent[5, 0] = silent[5, 1] = 0.0
    found = run("op", tensors, dropped)
    assert_close("output", found["output"], expert_layer(x, gate_up, down, chosen, silent), 1e-6)
    assert float(found["output"][5].abs().max()) == 0.0
    assert float(found["gradient of x"][5].abs().max()) == 0.0
    assert float(found["gradient of weights"][5].abs().max()) == 0.0


def test_shapes_that_do_not_fit_are_refused():
    (x, gate_up, down, weights), chosen = inputs(3, 4, 2)
    with pytest.raises(ValueError, match=r"expected \[T, C\], \[E, 2F, C\], \[E, C, F\]"):
        expert_layer(x, gate_up, down[:, :, :3], chosen, weights)


def test_arguments_that_do_not_fit_are_refused_by_name():
    (x, gate_up, down, weights), chosen = inputs(3, 4, 2)
    with pytest.raises(ValueError, match=r"weights \(3, 1\): expected both \[T, K\] with T = 3"):
        expert_layer(x, gate_up, down, chosen, weights[:, :1])
    with pytest.raises(ValueError, match=r"chosen \(2, 2\), .*with T = 3"):
        expert_layer(x, gate_up, down, chosen[:2], weights[:2])
    with pytest.raises(ValueError, match=r"chosen torch\.int32, .*expected torch\.int64"):
        expert_layer(x, gate_up, down, chosen.int(), weights)
    with pytest.raises(ValueError, match=r"down torch\.float64: expected one dtype"):
        expert_layer(x, gate_up, down.double(), chosen, weights)
    with pytest.raises(ValueError, match="weights on meta: expected one device"):
        expert_layer(x, gate_up, down, chosen, weights.to("meta"))


def test_no_token_gives_no_row_and_zero_gradients():
    (x, gate_up, down, weights), chosen = inputs(3, 4, 2)
    found = run("op", [x[:0], gate_up, down, weights[:0]], chosen[:0])
    assert found["output"].shape == (0, 12)
    assert float(found["gradient of gate_up"].abs().max()) == 0.0


def test_no_token_is_spread_to_no_row_and_summed_to_none():
    x = torch.ones(0, 8)
    places = sort_places(torch.zeros(0, 2, dtype=torch.int64), 3)
    rows = spread(x, places)
    assert rows.shape == combine(rows, places, 0).shape == x.shape


def test_autocast_takes_weights_of_another_dtype():
    (x, gate_up, down, weights), chosen = inputs(9, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = expert_layer(x, gate_up, down.double(), chosen, weights)
    assert out.dtype == torch.float32
    assert_close("output", out, expert_layer(x, gate_up, down, chosen, weights), 2e-2)


@pytest.mark.parametrize("count", [1, 9, 64, 65, 300])
def test_16_bit_products_meet_few_numbers_of_rows(count: int):
    extra = _extra_rows(torch.empty(count, 8, dtype=torch.bfloat16), count, False)
    least = least_rows(torch.empty(1))
    assert 0 <= extra < max(64, least)
    assert count + extra >= least
    assert (count + extra) % (64 if count > 64 else least) == 0 or count + extra == least


def test_route_is_the_softmax_over_all_renormalised_over_the_chosen():
    logits = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights, chosen = route(logits, 3)
    expected, order = logits.softmax(-1).topk(3, dim=-1)
    assert torch.equal(chosen, order)
    assert_close("weights", weights, expected / expected.sum(-1, keepdim=True), 1e-14)


def test_router_refuses_what_does_not_fit():
    x, weight = torch.zeros(3, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"weight \(2, 3\): expected \[T, C\] and \[E, C\]"):
        router_logits(x, weight[:, :3])
    with pytest.raises(ValueError, match="weight is on meta, x on cpu"):
        router_logits(x, weight.to("meta"))
    for top_k in (0, 3):
        with pytest.raises(ValueError, match=rf"top_k = {top_k}, .*1 <= top_k <= E"):
            route(torch.zeros(3, 2), top_k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_pieces_of_the_tokens_are_the_tokens(
    dtype: torch.dtype, frozen: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pieces, "PIECE_TOKENS", 16)
    results = []
    for in_pieces in (False, True):
        torch.manual_seed(0)
        x, gate_up, down, weights = (
            torch.randn(shape).to(dtype) for shape in ((45, 8), (4, 12, 8), (4, 8, 6), (45, 2))
        )
        chosen = torch.randint(5, (45, 2))
        given = [x, weights] if frozen else [x, gate_up, down, weights]
        for tensor in given:
            tensor.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            out = expert_layer(x, gate_up, down, chosen, weights, in_pieces=in_pieces)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out))
        results.append([out.detach(), *(tensor.grad for tensor in given)])
    bound = TOLERANCE[torch.bfloat16 if dtype == torch.float32 else dtype]
    for one, other in zip(*results, strict=True):
        assert_close("piece", other, one, bound)
