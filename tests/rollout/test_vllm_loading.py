"""Weights cut over ranks: the parts together are the whole, under both kinds of names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model import HybridConfig, HybridForCausalLM, preset
from model.kernels.experts.op import expert_layer
from model.layouts import write_tensors
from rollout.vllm_plugin.loading import Loader
from tests.helpers import assert_close

RANKS = 2


def config() -> HybridConfig:
    return preset(
        "tiny",
        vocab_size=40,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        head_dim=8,
        rotary_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    torch.manual_seed(0)
    return HybridForCausalLM(config())


def cut(model: HybridForCausalLM) -> dict[str, Any]:
    """Parameters of one rank full of nan; what vLLM's own loaders cut is only noted."""
    found: dict[str, Any] = {}
    for name, whole in model.state_dict().items():
        shape = list(whole.shape)
        if name.endswith(("qkv_proj.weight", "output_gate.weight", "attn.norm.weight")):
            shape[0] //= RANKS
        elif name.endswith(("out_proj.weight", "o_proj.weight", "experts.down_proj")):
            shape[-1] //= RANKS
        elif name.endswith("experts.gate_up_proj"):
            shape[1] //= RANKS
        found[name] = torch.full(shape, float("nan"))
    stacked = torch.nn.Parameter(torch.full((1,), float("nan")))
    for param, name in (
        (stacked, "model.layers.1.self_attn.qkv_proj.weight"),
        (torch.nn.Parameter(torch.ones(1)), "model.embed_tokens.weight"),
        (torch.nn.Parameter(torch.ones(1)), "lm_head.weight"),
    ):
        param.seen = {}
        param.weight_loader = lambda p, tensor, kind="": p.seen.update({kind: tensor})
        found[name] = param
    for kind in "qkv":
        del found[f"model.layers.1.self_attn.{kind}_proj.weight"]
    return found


@pytest.fixture(scope="module", params=["native", "transformers-disk"])
def ranks(request: pytest.FixtureRequest, model: HybridForCausalLM) -> list[dict[str, Any]]:
    parts = []
    for rank in range(RANKS):
        params = cut(model)
        loader = Loader(params, model.config, rank=rank, ranks=RANKS)
        stream = write_tensors(
            model.state_dict().items(), config=model.config, layout=request.param
        )
        assert loader.load(stream) == set(params)
        parts.append(params)
    return parts


def test_experts_of_all_ranks_sum_to_the_whole(model: HybridForCausalLM, ranks: list[dict]):
    x = torch.randn(9, 16)
    chosen, odds = torch.randint(4, (9, 2)), torch.rand(9, 2)
    prefix = "model.layers.0.mlp.experts."

    def run(weights: dict[str, Tensor]) -> Tensor:
        both = weights[prefix + "gate_up_proj"], weights[prefix + "down_proj"]
        return expert_layer(x, *both, chosen, odds)

    assert_close("experts", sum(run(part) for part in ranks), run(model.state_dict()))


def test_heads_lie_on_the_ranks_in_order(model: HybridForCausalLM, ranks: list[dict]):
    whole = model.state_dict()
    for name, dim in (
        ("model.layers.0.self_attn.qkv_proj.weight", 0),
        ("model.layers.0.self_attn.output_gate.weight", 0),
        ("model.layers.0.self_attn.norm.weight", 0),
        ("model.layers.0.self_attn.out_proj.weight", 1),
        ("model.layers.1.self_attn.o_proj.weight", 1),
    ):
        assert torch.equal(torch.cat([part[name] for part in ranks], dim), whole[name]), name


def test_what_vllm_cuts_itself_is_handed_over_whole(model: HybridForCausalLM, ranks: list[dict]):
    whole = model.state_dict()
    for part in ranks:
        seen = part["model.layers.1.self_attn.qkv_proj.weight"].seen
        for kind in "qkv":
            assert torch.equal(seen[kind], whole[f"model.layers.1.self_attn.{kind}_proj.weight"])
        assert torch.equal(part["lm_head.weight"].seen[""], whole["lm_head.weight"])


def test_whole_weights_are_whole_on_every_rank(model: HybridForCausalLM, ranks: list[dict]):
    for name in ("model.norm.weight", "model.layers.0.mlp.gate.weight"):
        assert all(torch.equal(part[name], model.state_dict()[name]) for part in ranks)


def test_unknown_and_misshapen_tensors_are_refused(model: HybridForCausalLM):
    loader = Loader(cut(model), model.config, rank=0, ranks=RANKS)
    with pytest.raises(ValueError, match="tensor visual is not part of this model"):
        loader.load([("visual", torch.ones(1))])
    for name, shape in (
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 12, 16)),
        ("model.layers.0.self_attn.out_proj.weight", (16, 16)),
        ("model.layers.1.self_attn.q_proj.weight", (16, 16)),
        ("model.embed_tokens.weight", (41, 16)),
        ("model.norm.weight", (1,)),
    ):
        with pytest.raises(ValueError, match=f"tensor {name} has shape .*, expected"):
            loader.load([(name, torch.ones(shape))])
