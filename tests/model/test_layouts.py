from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MiniMaxForCausalLM

from model import HybridConfig, HybridForCausalLM
from model.config import preset
from model.config_layouts import LAYOUTS, read_config, write_config
from model.layouts import read_tensors, tensor_names, tensor_spots, write_tensors


def small(**changes: object) -> HybridConfig:
    values = {
        "vocab_size": 33,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "rotary_dim": 4,
        "layer_types": ["linear_attention", "full_attention"],
    }
    return preset("tiny", **{**values, **changes})


def weights_of(config: HybridConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(HybridForCausalLM(config).state_dict())


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def semantics(config: HybridConfig) -> dict[str, object]:
    """What a config says of the numbers: everything but who wrote it."""
    drop = ("architectures", "transformers_version", "dtype", "_name_or_path")
    return {key: value for key, value in config.to_dict().items() if key not in drop}


@pytest.mark.parametrize("tied", [False, True])
def test_native_names_are_the_names_in_memory(tied: bool):
    config = small(tie_word_embeddings=tied)
    names = {name for name, _ in HybridForCausalLM(config).named_parameters()}
    assert set(tensor_names(config, "native")) == names


def test_disk_names_are_those_that_transformers_writes(tmp_path: Path):
    config = small(rotary_dim=8)
    HybridForCausalLM(config).save_pretrained(tmp_path)
    ours = load_file(tmp_path / "model.safetensors").keys()
    assert set(tensor_names(config, "transformers-disk")) == set(ours)
    MiniMaxForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    stripped = dict(read_tensors(theirs.items(), config=config, layout="transformers-disk"))
    assert set(stripped) == set(tensor_names(config, "native"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_go_out_and_come_back_bitwise(layout: str, tied: bool):
    config = small(tie_word_embeddings=tied)
    weights = weights_of(config)
    written = dict(write_tensors(weights.items(), config=config, layout=layout))
    assert tuple(sorted(written)) == tuple(sorted(tensor_names(config, layout)))
    there = read_config(json.loads(json.dumps(write_config(config, layout=layout))), layout=layout)
    # any order: shards need not follow the model
    back = dict(read_tensors(reversed(list(written.items())), config=there, layout=layout))
    expected = {n: v for n, v in weights.items() if n in tensor_names(there, "native")}
    assert_bitwise(back, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_goes_out_and_comes_back(layout: str):
    config = small(expert_capacity_factor=1.5, router_z_loss_coef=0.01, lm_head_fp32=True)
    values = json.loads(json.dumps(write_config(config, layout=layout)))
    back = read_config(values, layout=layout)
    assert semantics(back) == semantics(config)
    assert write_config(back, layout=layout) == values


def test_disk_layout_is_what_save_pretrained_writes(tmp_path: Path):
    config = small()
    model = HybridForCausalLM(config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    stream = write_tensors(model.state_dict().items(), config=config, layout="transformers-disk")
    assert_bitwise(dict(stream), saved)


def test_written_experts_can_be_saved_and_opened(tmp_path: Path):
    config = small()
    weights = weights_of(config)
    stream = write_tensors(weights.items(), config=config, layout="transformers-disk")
    save_file({name: value.clone() for name, value in stream}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(write_config(config, layout="transformers-disk"))
    )
    model = HybridForCausalLM.from_pretrained(tmp_path)
    assert_bitwise(dict(model.state_dict()), weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spots_say_where_each_tensor_lies_in_memory(layout: str):
    config = small()
    weights = weights_of(config)
    spots = tensor_spots(config, layout)
    for name, tensor in write_tensors(weights.items(), config=config, layout=layout):
        spot = spots.pop(name)
        whole = weights[spot.native] if spot.expert is None else weights[spot.native][spot.expert]
        assert torch.equal(whole.chunk(spot.num_parts)[spot.part], tensor), name
    assert not spots


def test_fused_tensor_comes_out_with_its_last_part():
    config = small()
    written = write_tensors(weights_of(config).items(), config=config, layout="text-01")
    seen = []

    def watched():
        for name, tensor in sorted(written):
            seen.append(name)
            yield name, tensor

    for name, _ in read_tensors(watched(), config=config, layout="text-01"):
        if name == "model.layers.0.mlp.experts.gate_up_proj":
            assert seen[-1] == "model.layers.0.block_sparse_moe.experts.3.w3.weight"
            assert not any(".layers.1." in name for name in seen)
            return
    pytest.fail("the fused tensor never came")


# The published keys (MiniMax-Text-01 and M1)

PUBLISHED = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "model_type": "minimax_m1",
    "auto_map": {"AutoConfig": "x.Y"},
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 200064,
}


def test_published_config_is_the_preset():
    ours = semantics(preset("minimax-text-01"))
    read = semantics(read_config(PUBLISHED, layout="text-01"))
    own = ("bos_token_id", "eos_token_id")
    assert {k: v for k, v in read.items() if k not in own} == {
        k: v for k, v in ours.items() if k not in own
    }


def test_other_spelling_of_the_layer_kinds_reads_the_same():
    values = dict(PUBLISHED)
    values["decoder_attention_types"] = values.pop("attn_type_list")
    assert semantics(read_config(values, layout="text-01")) == semantics(
        read_config(PUBLISHED, layout="text-01")
    )


def test_missing_postnorm_is_prenorm_in_the_published_layout():
    values = {key: value for key, value in PUBLISHED.items() if key != "postnorm"}
    assert read_config(values, layout="text-01").postnorm is False


def test_vllm_config_names_what_its_loader_reads():
    values = write_config(small(tie_word_embeddings=True), layout="vllm")
    assert values["postnorm"] is True
    assert values["attn_type_list"] == [0, 1]
    assert values["head_dim"] == 8
    assert values["rotary_dim"] == 4
    assert values["tie_word_embeddings"] is False
    assert values["layernorm_mlp_alpha"] == values["mlp_alpha_factor"]
    assert values["architectures"] == ["MiniMaxForCausalLM"]


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_intermediate_size": 128}, "shared_intermediate_size = 128, expected 0"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling = .* expected None"),
        ({"attn_type_list": [0, 2] * 40}, r"attn_type_list holds \[2\], expected only 0 and 1"),
        ({"decoder_attention_types": [1] * 80}, "expected one list of 0"),
    ],
)
def test_published_keys_that_are_not_computed_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        read_config({**PUBLISHED, **change}, layout="text-01")


def test_missing_layer_kinds_are_refused():
    values = {key: value for key, value in PUBLISHED.items() if key != "attn_type_list"}
    with pytest.raises(ValueError, match="attn_type_list = missing, expected one list"):
        read_config(values, layout="text-01")


@pytest.mark.parametrize("layout", ["text-01", "vllm"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 6}, "num_attention_heads = 6, expected a power of two"),
        (
            {"layer_types": ["linear_attention", "sliding_attention"], "sliding_window": 8},
            "layer_types = sliding_attention, expected only",
        ),
        ({"sliding_window": 8}, "sliding_window = 8, expected null"),
    ],
)
def test_layout_that_would_compute_otherwise_is_refused(layout: str, change: dict, message: str):
    config = small(**change)
    with pytest.raises(ValueError, match=message):
        write_config(config, layout=layout)
    with pytest.raises(ValueError, match=message):
        next(write_tensors([], config=config, layout=layout))


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout = 'gguf', expected one of native"):
        tensor_names(small(), "gguf")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unknown_double_and_missing_tensors_are_refused(layout: str):
    config = small()
    written = list(write_tensors(weights_of(config).items(), config=config, layout=layout))
    with pytest.raises(ValueError, match=r"tensor visual\.weight is not part of this model"):
        list(read_tensors([("visual.weight", torch.ones(1))], config=config, layout=layout))
    with pytest.raises(ValueError, match=f"tensor {written[0][0]} came twice"):
        list(read_tensors([written[0], *written], config=config, layout=layout))
    with pytest.raises(ValueError, match=f"1 tensors are missing: {written[-1][0]}"):
        list(read_tensors(written[:-1], config=config, layout=layout))


def test_two_different_tied_matrices_are_refused():
    config = small(tie_word_embeddings=True)
    stream = [
        ("model.embed_tokens.weight", torch.ones(2, 2)),
        ("lm_head.weight", torch.zeros(2, 2)),
    ]
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model.embed_tokens.weight"):
        list(read_tensors(stream, config=config, layout="native"))
