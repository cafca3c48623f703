from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import HybridConfig, HybridForCausalLM, Packed
from model.config import PRESETS, count_operations, count_parameters, preset


def built_on_meta(config: HybridConfig) -> HybridForCausalLM:
    with torch.device("meta"):
        return HybridForCausalLM(config)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tied", [False, True])
def test_counted_parameters_are_those_of_the_built_model(name: str, tied: bool):
    config = preset(name, tie_word_embeddings=tied)
    model = built_on_meta(config)
    counted = count_parameters(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    idle = config.num_local_experts - config.num_experts_per_tok
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert counted.active == counted.total - experts * idle // config.num_local_experts


def test_largest_preset_has_the_report_s_parameters():
    counted = count_parameters(preset("minimax-text-01"))
    assert f"{counted.total / 1e9:.2f}" == "456.09"
    assert f"{(counted.active - counted.embeddings) / 1e9:.2f}" == "45.94"


@pytest.mark.parametrize(
    ("name", "low", "high"), [("tiny", 2e6, 4e6), ("small", 8e7, 1.2e8), ("base", 1.8e9, 2.0e9)]
)
def test_presets_have_the_size_that_they_say(name: str, low: float, high: float):
    assert low <= count_parameters(preset(name)).total <= high


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_begins_with_lightning_and_ends_with_softmax(name: str):
    kinds = preset(name).layer_types
    assert kinds == (["linear_attention"] * 7 + ["full_attention"]) * (len(kinds) // 8)


def test_our_defaults_are_what_transformers_computes():
    config = HybridConfig()
    assert config.postnorm is True
    assert config.rotary_dim is None
    assert config.lightning_norm_eps == 1e-6
    assert config.expert_capacity_factor == 0.0


def test_small_presets_carry_deepnorm_gains_of_their_own_depth():
    assert preset("tiny").mlp_alpha_factor == 16**0.25
    assert preset("tiny", num_hidden_layers=16).linear_attn_alpha_factor == 32**0.25


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset = 'huge', expected one of tiny, small, base"):
        preset("huge")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["mamba"] * 8}, r"layer_types = \['mamba'\], expected only"),
        ({"layer_types": ["full_attention"]}, "layer_types = 1 kinds, expected one for each"),
        ({"layer_types": ["sliding_attention"] * 8}, "sliding_window = None, expected a number"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu, expected silu"),
        ({"attention_dropout": 0.1}, r"attention_dropout = 0\.1, expected 0"),
        ({"router_jitter_noise": 0.1}, r"router_jitter_noise = 0\.1, expected 0"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            r"rope_parameters\.rope_type = yarn, expected default",
        ),
        ({"rotary_dim": 33}, "rotary_dim = 33, expected even, 2 to head_dim = 32"),
        ({"rotary_dim": 34}, "rotary_dim = 34, expected even, 2 to head_dim = 32"),
        ({"rotary_dim": 0}, "rotary_dim = 0, expected even, 2 to head_dim = 32"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4, expected a multiple of"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5, expected 1 to"),
        ({"router_aux_scaling": "none"}, "router_aux_scaling = none, expected switch or paper"),
        ({"expert_capacity_factor": -1.0}, r"expert_capacity_factor = -1\.0, expected >= 0"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        preset("tiny", **change)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_operations_are_those_that_torch_counts(name: str):
    kinds = [*["linear_attention"] * 3, "full_attention"]
    config = preset(name, num_hidden_layers=4, layer_types=kinds)
    tokens = torch.arange(200)
    packed = Packed(tokens, tokens, (200,))
    # fp64: the products of fp32 on a CPU are oneDNN's, which torch does not count
    model = HybridForCausalLM(config).double()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(packed=packed, targets=tokens)
    counted = counter.get_flop_counts()["Global"]
    assert counted[torch.ops.aten.mm] == count_operations(config, [200]).weights


def test_mixing_counts_what_a_token_sees():
    base = preset("tiny", num_hidden_layers=1, layer_types=["full_attention"])
    head = 4 * 4 * 32
    assert count_operations(base, [3, 2]).mixing == head * (1 + 2 + 3 + 1 + 2)
    slides = {"layer_types": ["sliding_attention"], "sliding_window": 2}
    assert count_operations(preset("tiny", num_hidden_layers=1, **slides), [4]).mixing == head * 7
    lightning = preset("tiny", num_hidden_layers=1, layer_types=["linear_attention"])
    assert count_operations(lightning, [3, 2]).mixing == 5 * head * (32 + 32)
