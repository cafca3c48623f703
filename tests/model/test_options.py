"""What transformers' `minimax` does not have, against the plain reading in dense.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model import HybridForCausalLM, Packed
from model.config import preset
from model.moe import balance_loss, drop_over_capacity, router_load, router_z_loss
from tests.helpers import assert_close
from tests.model.dense import dense_logits
from tests.model.setting import (
    EXACT,
    build,
    packed_logits,
    random_sequences,
    separate_logits,
)

KINDS = ["linear_attention", "sliding_attention", "linear_attention", "full_attention"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotary_dim": None},
        {"rotary_dim": 2},
        {"postnorm": False},
        {"postnorm": False, "mlp_alpha_factor": 1.3, "mlp_beta_factor": 0.7},
        {"layer_types": KINDS * 2, "sliding_window": 5},
        {"layer_types": KINDS * 2, "sliding_window": 1},
        {"layer_types": KINDS * 2, "sliding_window": 500},
        # transformers' own meaning: without a sliding layer the window is every softmax layer's
        {"sliding_window": 7},
        {"lightning_norm_eps": 1e-2},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4, "num_experts_per_tok": 3},
        {"num_attention_heads": 6, "num_key_value_heads": 3},
        {"num_hidden_layers": 1, "layer_types": ["linear_attention"]},
        {"full_attn_beta_factor": 0.5, "linear_attn_beta_factor": 1.5},
    ],
    ids=str,
)
def test_equals_the_plain_reading(changes: dict):
    model = build(**changes).double()
    sequences = random_sequences([40, 1, 9])
    with torch.no_grad():
        found = packed_logits(model, Packed.from_sequences(sequences)).split([40, 1, 9])
    weights = dict(model.state_dict())
    for out, sequence in zip(found, sequences, strict=True):
        # 1e-6: slopes and angles are fp32 in the model and fp64 in the plain reading
        assert_close("logits", out, dense_logits(model.config, weights, sequence), EXACT)


def test_rotary_on_half_of_the_head_is_not_rotary_on_all_of_it():
    (sequence,) = random_sequences([30])
    half, whole = build(rotary_dim=8), build(rotary_dim=16)
    first, second = (separate_logits(model, [sequence])[0] for model in (half, whole))
    assert float((first - second).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("window", [3, 20])
def test_sliding_window_holds_in_a_cache(window: int):
    model = build(layer_types=KINDS * 2, sliding_window=window).double()
    (sequence,) = random_sequences([50])
    out = model.generate(
        input_ids=torch.tensor([sequence]),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    full = separate_logits(model, out.sequences.tolist())[0][49:-1]
    # transformers hands logits on in fp32
    assert_close("logits", torch.cat(out.logits), full.float(), EXACT)


# Token-drop


@pytest.mark.parametrize("factor", [0.4, 1.0, 1.5])
def test_tokens_over_capacity_are_dropped_in_training(factor: float):
    model = build(expert_capacity_factor=factor).double()
    (sequence,) = random_sequences([37])
    capacity = math.ceil(factor * 37 * 2 / 4)
    expected = dense_logits(model.config, dict(model.state_dict()), sequence, capacity=capacity)
    with torch.no_grad():
        found = packed_logits(model.train(), Packed.from_sequences([sequence]))
        whole = packed_logits(model.eval(), Packed.from_sequences([sequence]))
    assert_close("logits", found, expected, EXACT)
    undropped = dense_logits(model.config, dict(model.state_dict()), sequence)
    assert_close("logits", whole, undropped, EXACT)
    assert float((found - whole).abs().max()) > 1e-6 or factor == 1.5


def test_wide_capacity_drops_nothing():
    model = build(expert_capacity_factor=2.0)
    packed = Packed.from_sequences(random_sequences([37, 4]))
    with torch.no_grad():
        assert torch.equal(
            packed_logits(model.train(), packed), packed_logits(model.eval(), packed)
        )


def test_first_come_is_first_served():
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0]])
    kept = drop_over_capacity(chosen, 4, 1.0)
    assert kept.tolist() == [[0, 1], [0, 2], [4, 1], [3, 4]]


# Losses and metrics of the router


def test_balance_loss_at_balance_and_at_collapse():
    # every expert is chosen equally often and is equally probable in the mean
    even = torch.eye(4)[[0, 1, 2, 3]] * 2 + torch.eye(4)[[1, 2, 3, 0]]
    assert_close("switch", balance_loss([even], 2), torch.tensor(2.0), EXACT)
    assert_close("paper", balance_loss([even], 2, "paper"), torch.tensor(1 / 16), EXACT)
    collapsed = torch.tensor([[50.0, 50.0, 0.0, 0.0]]).repeat(8, 1)
    assert_close("switch", balance_loss([collapsed], 2), torch.tensor(4.0), EXACT)
    assert_close("paper", balance_loss([collapsed], 2, "paper"), torch.tensor(1 / 8), EXACT)


def test_z_loss_is_the_mean_squared_log_sum_exp():
    logits = [torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[3.0, -3.0], [0.0, 1.0]])]
    expected = torch.cat(logits).logsumexp(-1).square().mean()
    assert_close("z", router_z_loss(logits), expected, EXACT)


def test_packed_call_adds_up_the_router_losses():
    model = build(router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    out = model(packed=Packed.from_sequences(random_sequences([20, 3])))
    expected = 0.5 * balance_loss(out.router_logits, 2) + 0.25 * router_z_loss(out.router_logits)
    assert_close("aux_loss", out.aux_loss, expected, EXACT)
    silent = build(router_aux_loss_coef=0.0)
    assert silent(packed=Packed.from_sequences(random_sequences([3]))).aux_loss is None


def test_load_metrics_tell_even_from_collapsed():
    even = torch.eye(4)[[0, 1, 2, 3]] * 2 + torch.eye(4)[[1, 2, 3, 0]]
    assert router_load([even], 2).share.tolist() == [[0.25] * 4]
    collapsed = torch.tensor([[50.0, 50.0, 0.0, 0.0]]).repeat(8, 1)
    load = router_load([collapsed], 2, 1.0)
    assert float(load.worst) == 2.0
    # capacity is ceil(1.0 * 8 * 2 / 4) = 4 of the 8 tokens that each of two experts got
    assert float(load.dropped) == 0.5


# Precision


def test_fp32_head_is_sharper_than_a_bf16_head():
    model = build().bfloat16()
    hidden = torch.randn(5, 32).bfloat16()
    exact = hidden.double() @ model.lm_head.weight.double().T
    model.config.lm_head_fp32 = True
    assert_close("logits", model.logits(hidden), exact, EXACT)
    model.config.lm_head_fp32 = False
    assert float((model.logits(hidden).double() - exact).detach().abs().max()) > 1e-5
    assert model.logits(hidden).dtype == torch.float32


def test_bf16_model_keeps_exact_slopes():
    model = build().bfloat16()
    names = [name for name, _ in model.named_buffers()]
    assert names == []
    assert all(value.dtype == torch.bfloat16 for value in model.state_dict().values())


def test_bf16_stays_near_fp32():
    sequences = random_sequences([60])
    model = HybridForCausalLM(preset("tiny", num_hidden_layers=2)).eval()
    tokens = torch.tensor(sequences)

    def logprobs(lm: HybridForCausalLM) -> Tensor:
        with torch.no_grad():
            return lm(input_ids=tokens).logits.log_softmax(-1)

    exact = logprobs(model)
    assert_close("logprobs", logprobs(model.bfloat16()), exact, 1e-2)


def test_cached_key_dtype_follows_the_model():
    model = build().bfloat16()
    assert model.model.new_cache(2).pages.dtype == torch.bfloat16
    assert model.model.new_cache(2).states.dtype == torch.float32


def test_a_sampled_pad_token_has_finite_gradients():
    torch.manual_seed(0)
    config = preset("tiny", vocab_size=64, pad_token_id=5)
    model = HybridForCausalLM(config)
    packed = Packed.from_sequences([[1, 5, 5, 2, 5]])
    model(packed=packed, targets=torch.tensor([5, 5, 2, 5, 0])).logprobs.sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert gradient[5].norm() > 0
