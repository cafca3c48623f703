"""Recorded experts in place of the router's: its own choice changes nothing, others are taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import HybridForCausalLM, Packed, preset
from model.checkpointing import Checkpointing
from model.kernels.experts.router import route

PACKED = Packed.from_sequences([[1, 2, 3, 4, 5, 6, 7], [8, 9], [10] * 5])
TARGETS = torch.tensor([2, 3, 4, 5, 6, 7, 0, 9, 0, 10, 10, 10, 10, 0])


def make_model(checkpointing: Checkpointing = "none") -> HybridForCausalLM:
    torch.manual_seed(0)
    model = HybridForCausalLM(
        preset(
            "tiny",
            vocab_size=32,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            initializer_range=0.2,
        )
    )
    model.model.checkpointing = checkpointing
    return model


def run(
    model: HybridForCausalLM, experts: Tensor | None
) -> tuple[Tensor, dict[str, Tensor], tuple]:
    model.zero_grad()
    out = model(packed=PACKED, targets=TARGETS, experts=experts)
    out.logprobs.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return out.logprobs.detach(), gradients, out.router_logits


def own_experts(model: HybridForCausalLM) -> Tensor:
    logits = model(packed=PACKED).router_logits
    top_k = model.config.num_experts_per_tok
    return torch.stack([route(layer, top_k)[1] for layer in logits], dim=1).to(torch.int16)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_replaying_ones_own_experts_changes_no_bit(checkpointing: Checkpointing):
    model = make_model(checkpointing)
    own = own_experts(model)
    own[3:5] = -1
    plain, gradients, _ = run(model, None)
    again, replayed, _ = run(model, own)
    assert torch.equal(plain, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, replayed[name]), name
    assert gradients["model.layers.0.mlp.gate.weight"].abs().max() > 0


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_other_experts_are_taken_and_the_gate_learns_from_them(checkpointing: Checkpointing):
    model = make_model(checkpointing)
    other = (own_experts(model) + 1) % model.config.num_local_experts
    plain, _, _ = run(model, None)
    replayed, gradients, logits = run(model, other)
    assert (plain - replayed).abs().max() > 1e-3
    layer = model.model.layers[0].mlp
    x = torch.randn(14, 32)
    out, scores = layer(x, other[:, 0])
    weights = scores.gather(-1, other[:, 0].long()).softmax(-1)
    one_by_one = sum(
        weights[:, k, None] * layer.experts(x, other[:, 0, k, None].long(), torch.ones(14, 1))
        for k in range(weights.shape[1])
    )
    torch.testing.assert_close(out, one_by_one)
    assert gradients["model.layers.1.mlp.gate.weight"].abs().max() > 0
    assert len(logits) == 2


def test_gradients_reach_the_logits_of_the_experts_that_did_the_work():
    layer = make_model().model.layers[0].mlp
    logits: list[Tensor] = []

    def keep(_gate: object, _x: object, out: Tensor) -> None:
        out.retain_grad()
        logits.append(out)

    layer.gate.register_forward_hook(keep)
    taken = torch.tensor([[3, 1], [0, 2]])
    layer(torch.randn(2, 32, requires_grad=True), taken)[0].square().sum().backward()
    touched = logits[0].grad != 0
    assert touched.nonzero().tolist() == [[0, 1], [0, 3], [1, 0], [1, 2]]


def test_experts_of_another_shape_or_in_another_form_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"recorded \(14, 1\): expected \[T, K\] = \(14, 2\)"):
        model(packed=PACKED, experts=torch.zeros(14, 2, 1, dtype=torch.int16))
    with pytest.raises(ValueError, match="packed"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64), experts=torch.zeros(3, 2, 2))
