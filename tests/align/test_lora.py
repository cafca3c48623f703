from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from align import shared_adapters
from align.data.batch import Batch
from align.lora import LoraConfig, apply_lora
from tests.align import small
from tests.helpers import assert_close

BATCH = Batch.from_examples(small.examples(4))


def logprobs(model: nn.Module) -> Tensor:
    return model(packed=BATCH.packed, targets=BATCH.targets).logprobs


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def shake(model: nn.Module) -> None:
    """Moves every adapter away from 0, as training would."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("targets", ["attention", "experts", "all"])
@pytest.mark.parametrize("router", [False, True])
def test_laws(targets: str, router: bool) -> None:
    base = logprobs(small.model())
    model = apply_lora(small.model(), LoraConfig(rank=4, targets=targets, router=router), seed=0)
    assert torch.equal(logprobs(model), base), "a new adapter changes nothing"
    names = trained_names(model)
    assert all("lora_" in name for name in names)
    assert any("self_attn" in name for name in names) == (targets != "experts")
    assert any("mlp.experts" in name for name in names) == (targets != "attention")
    assert any("mlp.gate" in name for name in names) == router

    shake(model)
    adapted = logprobs(model)
    assert (adapted - base).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logprobs(model), base), "an adapter switched off is not there"
    adapted.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    merged = model.merge_and_unload()
    assert_close("merged", logprobs(merged), adapted, 1e-5)
    assert type(merged) is type(small.model())


def test_each_expert_has_its_own_adapter() -> None:
    model = apply_lora(small.model(), LoraConfig(rank=4, targets="experts"), seed=0)
    num_experts = model.config.num_local_experts
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert parameter.shape[0] == 4 * num_experts
    # Moving the first expert's factors moves that expert's weight and no other.
    shake(model)
    before = small.model().model.layers[0].mlp.experts.gate_up_proj
    inner = model.base_model.model.model.layers[0].mlp.experts.base_layer
    with torch.no_grad():
        inner.lora_A["default"].weight[4:] = 0
    moved = model.merge_and_unload().model.layers[0].mlp.experts.gate_up_proj
    assert not torch.equal(moved[0], before[0])
    assert torch.equal(moved[1:], before[1:])


def test_first_values_follow_the_seed_and_leave_the_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    models = [apply_lora(small.model(), LoraConfig(rank=2), seed=s) for s in (1, 1, 2)]
    first, same, other = ({n: p for n, p in m.named_parameters() if "lora_A" in n} for m in models)
    name = next(iter(first))
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])
    torch.manual_seed(3)
    model = small.model()
    torch.manual_seed(3)
    apply_lora(model, LoraConfig(rank=2), seed=9)
    assert torch.equal(torch.rand(1), expected)


def test_adapters_of_a_bf16_base_are_fp32() -> None:
    model = apply_lora(small.model().bfloat16(), LoraConfig(rank=2, router=True), seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_gradient_checkpointing_with_experts() -> None:
    gradients = []
    for recompute in (False, True):
        model = apply_lora(small.model(), LoraConfig(rank=2), seed=0).train()
        shake(model)
        if recompute:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        logprobs(model).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(gradient.any() for gradient in gradients[0])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_needs_inputs() -> None:
    assert LoraConfig(targets="attention", dropout=0.1).dropout == 0.1
    message = r"lora\.dropout = 0\.1, expected 0 with lora\.targets = all and lora\.router = False"
    with pytest.raises(ValidationError, match=message):
        LoraConfig(dropout=0.1)


def test_shared_adapters_need_a_torch_that_trains_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shared_adapters.check_torch()
    monkeypatch.setattr(shared_adapters, "is_torch_version", lambda *_: True)
    with pytest.raises(ValueError, match=r"parallel.expert above 1, expected 2\.13 or newer; upd"):
        shared_adapters.check_torch()
