"""The model is transformers' `minimax`: same logits, loss and gradients, same files."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MiniMaxConfig, MiniMaxForCausalLM

from model import HybridConfig, HybridForCausalLM
from tests.helpers import assert_close, error

DECAY_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
LENGTHS = (1, 63, 255, 256, 257, 1000)
GROUPS = (1, 4, 8)
GRID = [
    (layers, dim, group, length)
    for layers, dim, group, length in product((8, 16), (32, 64, 128), GROUPS, LENGTHS)
]
# Every value of every axis, and the block borders at more than one size.
COVER = [
    (8, 32, 1, 1),
    (8, 64, 8, 63),
    (16, 32, 4, 255),
    (8, 128, 4, 256),
    (16, 64, 1, 257),
    (8, 32, 8, 1000),
]


def shared_config(
    layers: int = 8, dim: int = 32, group: int = 4, scale: float = 0.05
) -> dict[str, object]:
    heads = 8
    return {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // group,
        "head_dim": dim,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": [
            "full_attention" if (i + 1) % 8 == 0 else "linear_attention" for i in range(layers)
        ],
        "full_attn_alpha_factor": 1.9,
        "linear_attn_alpha_factor": 1.7,
        "mlp_alpha_factor": 2.1,
        "full_attn_beta_factor": 0.9,
        "linear_attn_beta_factor": 1.1,
        "mlp_beta_factor": 0.8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
        "initializer_range": scale,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def pair(seed: int = 0, **axes: float) -> tuple[HybridForCausalLM, MiniMaxForCausalLM]:
    """Ours and theirs, fp32, with the same random weights (norm gains too)."""
    torch.manual_seed(seed)
    values = shared_config(**axes)
    theirs = MiniMaxForCausalLM._from_config(MiniMaxConfig(**values), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = HybridForCausalLM(HybridConfig(**values, rotary_dim=values["head_dim"]))
    weights = {
        name: value
        for name, value in theirs.state_dict().items()
        if not name.endswith(DECAY_BUFFERS)
    }
    ours.load_state_dict(weights, strict=True)
    return ours.train(), theirs.train()


def nearest_choice(model: HybridForCausalLM, tokens: Tensor) -> float:
    """How far the last expert chosen and the first one left lie apart, in fp64, at the nearest."""
    with torch.no_grad():
        out = copy.deepcopy(model).double()(input_ids=tokens, output_router_logits=True)
    greatest = torch.cat(out.router_logits).topk(model.config.num_experts_per_tok + 1, dim=-1)[0]
    return float((greatest[:, -2] - greatest[:, -1]).min())


def pair_that_agrees(tokens: Tensor, **axes: float) -> tuple[HybridForCausalLM, MiniMaxForCausalLM]:
    """The first pair in which no rounding of fp32 chooses an expert: that is no difference of the
    models, and moves every later token."""
    for seed in range(20):
        ours, theirs = pair(seed, **axes)
        if nearest_choice(ours, tokens) > 1e-6:
            return ours, theirs
    raise AssertionError(f"{axes}: in every pair two experts are within 1e-6 at some token")


def compare(layers: int, dim: int, group: int, length: int) -> None:
    # One token alone: gradients of the router nearly cancel, and at 0.05 either model is 1e-4 off
    # its own fp64 result. There transformers' default stands, and fp64 settles what is left.
    scale = 0.02 if length == 1 else 0.05
    tokens = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(length))
    ours, theirs = pair_that_agrees(tokens, layers=layers, dim=dim, group=group, scale=scale)
    mine = ours(input_ids=tokens, labels=tokens, output_router_logits=True)
    other = theirs(input_ids=tokens, labels=tokens, output_router_logits=True)
    assert_close("logits", mine.logits, other.logits, 1e-5)
    largest = float((mine.logits - other.logits).abs().max())
    assert largest <= 1e-4 * float(other.logits.abs().max()), f"logits: max abs {largest:.1e}"
    assert_close("aux_loss", mine.aux_loss, other.aux_loss, 1e-5)
    if length == 1:
        # One token has no target: compare the gradient of its logits instead of a loss of 0/0.
        probe = torch.randn(97, generator=torch.Generator().manual_seed(1))
        mine_loss, other_loss = (mine.logits @ probe).sum(), (other.logits @ probe).sum()
        exact = copy.deepcopy(ours).double()
        (exact(input_ids=tokens).logits @ probe.double()).sum().backward()
    else:
        assert_close("loss", mine.loss, other.loss, 1e-5)
        mine_loss, other_loss = mine.loss, other.loss
    mine_loss.backward()
    other_loss.backward()
    reference = dict(theirs.named_parameters())
    scale = max(
        float(p.grad.square().mean().sqrt()) for p in reference.values() if p.grad is not None
    )
    for name, parameter in ours.named_parameters():
        expected = reference[name].grad
        assert parameter.grad is not None, f"{name} has no gradient"
        if float(expected.square().mean().sqrt()) < 1e-6 * scale:
            # A gradient of rounding noise only (a key with no rival, say) has no relative error.
            assert float(parameter.grad.square().mean().sqrt()) < 1e-5 * scale, name
            continue
        found = error(parameter.grad, expected)
        if length == 1 and found > 1e-4:
            truth = exact.get_parameter(name).grad
            found = error(parameter.grad, truth)
            assert found < error(expected, truth), f"gradient of {name}: fp64 sides with the other"
        assert found <= 1e-4, f"gradient of {name}: relative error {found:.2e}"


@pytest.mark.parametrize(("layers", "dim", "group", "length"), COVER)
def test_logits_loss_and_every_gradient_equal(layers: int, dim: int, group: int, length: int):
    compare(layers, dim, group, length)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "dim", "group", "length"), GRID)
def test_logits_loss_and_every_gradient_equal_on_the_grid(
    layers: int, dim: int, group: int, length: int
):
    compare(layers, dim, group, length)


def test_batch_without_padding_equals():
    ours, theirs = pair()
    tokens = torch.randint(3, 97, (3, 70), generator=torch.Generator().manual_seed(0))
    mine = ours(input_ids=tokens, labels=tokens, output_router_logits=True)
    other = theirs(input_ids=tokens, labels=tokens, output_router_logits=True)
    assert_close("logits", mine.logits, other.logits, 1e-5)
    assert_close("loss", mine.loss, other.loss, 1e-5)
    assert_close("aux_loss", mine.aux_loss, other.aux_loss, 1e-5)


def test_right_padded_batch_with_mask_equals():
    ours, theirs = pair()
    tokens = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 25:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    arguments = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    mine = ours(**arguments, output_router_logits=True)
    other = theirs(**arguments, output_router_logits=True)
    assert_close("logits", mine.logits[mask.bool()], other.logits[mask.bool()], 1e-5)
    assert_close("loss", mine.loss, other.loss, 1e-5)
    assert_close("aux_loss", mine.aux_loss, other.aux_loss, 1e-5)


def test_unpadded_greedy_generation_equals():
    ours, theirs = pair()
    tokens = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(4))
    arguments = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    mine = ours.eval().generate(input_ids=tokens, **arguments)
    assert mine.tolist() == theirs.eval().generate(input_ids=tokens, **arguments).tolist()


# Files


def read_folder(folder: Path) -> dict[str, Tensor]:
    return {
        name: value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def test_files_go_to_transformers_and_back_bitwise(tmp_path: Path):
    ours, _ = pair()
    ours.save_pretrained(tmp_path / "ours")
    theirs, report = MiniMaxForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    missing = [n for n in report["missing_keys"] if not n.endswith(DECAY_BUFFERS)]
    assert not missing
    assert not report["unexpected_keys"]
    state = theirs.state_dict()
    assert_bitwise(
        {n: v for n, v in state.items() if not n.endswith(DECAY_BUFFERS)}, dict(ours.state_dict())
    )
    theirs.save_pretrained(tmp_path / "theirs")
    again, report = HybridForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"]
    assert_bitwise(dict(again.state_dict()), dict(ours.state_dict()))
    tokens = torch.arange(3, 60)[None]
    assert_close("logits", theirs(tokens).logits, ours(tokens).logits, 1e-5)
    assert torch.equal(again.train()(tokens).logits, ours(tokens).logits)


def test_files_are_an_ordinary_minimax_checkpoint(tmp_path: Path):
    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    names = read_folder(tmp_path).keys()
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names
    assert "model.layers.7.block_sparse_moe.gate.weight" in names
    assert not [name for name in names if name.endswith(DECAY_BUFFERS) or "inv_freq" in name]
    config = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert config["model_type"] == "minimax"
    assert config["architectures"] == ["MiniMaxForCausalLM"]


def test_bf16_files_round_trip_bitwise(tmp_path: Path):
    ours, _ = pair()
    ours.bfloat16().save_pretrained(tmp_path / "ours")
    MiniMaxForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").save_pretrained(
        tmp_path / "theirs"
    )
    again = HybridForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto")
    assert_bitwise(dict(again.state_dict()), dict(ours.state_dict()))


def test_auto_class_gives_the_native_model_and_keeps_our_keys(tmp_path: Path):
    values = shared_config()
    config = HybridConfig(**values, rotary_dim=16)
    HybridForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is HybridForCausalLM
    assert type(model.config) is HybridConfig
    assert model.config.rotary_dim == 16
    assert AutoConfig.from_pretrained(tmp_path).rotary_dim == 16
    drop = ("architectures", "transformers_version", "dtype", "_name_or_path")
    first, second = config.to_dict(), model.config.to_dict()
    for key in drop:
        first.pop(key, None)
        second.pop(key, None)
    assert first == second
