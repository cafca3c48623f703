"""Rounded experts: the engine is the model whose weights are the rounded ones."""

from __future__ import annotations

import random

import pytest
import torch

from align.lora import LoraConfig, apply_lora
from model import Packed
from model.moe import Experts
from rollout.native.engine import NativeEngine
from rollout.native.int8 import int8_experts
from rollout.sync import checksums, weights
from tests.rollout.native.setting import make_model, requests_of


def test_logprobs_are_those_of_the_rounded_weights_and_the_live_ones_stay():
    model, rounded = make_model(), make_model()
    with torch.no_grad():
        for one in int8_experts(rounded):
            one.refresh()
            live = one.experts.gate_up_proj, one.experts.down_proj
            for weight, (whole, scale) in zip(live, one.weights, strict=True):
                exact = weight.clone()
                weight.copy_(whole * scale[..., None])
                # at most half a step of its channel
                assert ((weight - exact).abs() <= 0.5001 * scale[..., None]).all()
    before = checksums(weights(model))
    engine = NativeEngine(model, max_slots=9, max_cache_tokens=999, page_tokens=8, experts="int8")
    done = engine.generate(requests_of(random.Random(0), 5))
    assert checksums(weights(model)) == before
    assert all(m.core.__name__ == "expert_layer" for m in model.modules() if isinstance(m, Experts))
    for one in done:
        with torch.no_grad():
            hidden = rounded.model.run(Packed.from_sequences([one.prompt + one.tokens])).hidden
            row = rounded.logits(hidden)[len(one.prompt) - 1 : -1].log_softmax(-1)
        exact = row.gather(-1, torch.tensor(one.tokens)[:, None])[:, 0]
        assert one.logprobs == pytest.approx(exact.tolist(), abs=1e-5)


def test_new_weights_are_rounded_anew():
    model = make_model()
    options = {"max_slots": 9, "max_cache_tokens": 999, "page_tokens": 8, "experts": "int8"}
    engine = NativeEngine(model, **options)
    requests = requests_of(random.Random(0), 2)
    first = engine.generate(requests)
    engine.update_weights(make_model(1).state_dict().items(), version=1)
    second = engine.generate(requests)
    exact = NativeEngine(make_model(1), **options).generate(requests)
    assert [one.logprobs for one in second] == [one.logprobs for one in exact]
    assert [one.logprobs for one in first] != [one.logprobs for one in second]


def test_adapted_experts_are_refused():
    adapted = apply_lora(make_model(), LoraConfig(rank=2, targets="experts"), seed=0)
    with pytest.raises(ValueError, match=r"mlp\.experts has an adapter; int8 experts need plain"):
        int8_experts(adapted.get_base_model())
