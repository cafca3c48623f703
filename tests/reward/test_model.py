"""RewardModel: neighbours do not matter, labels reach their own head, files come back bitwise."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from model import HybridModel, Packed, preset
from reward.hierarchy import HIERARCHY, Hierarchy
from reward.model import HEADS_FILE, REWARD_FILE, RewardModel
from tests.helpers import assert_close

LEARNED = HIERARCHY.model_copy(update={"gate": "learned"})
SEQUENCES = [[5, 6, 7, 8], [9, 3], [4, 4, 4, 4, 4, 4, 4], [2, 1, 9]]
PROMPTS = [2, 1, 5, 1]


def tiny(hierarchy: Hierarchy = LEARNED, seed: int = 0) -> RewardModel:
    torch.manual_seed(seed)
    shape = preset(
        "tiny",
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    model = RewardModel(HybridModel(shape), hierarchy)
    if model.gate is not None:
        torch.nn.init.normal_(model.gate.weight)
    return model.eval()


@torch.no_grad()
def test_a_value_does_not_depend_on_its_neighbours_in_the_pack():
    model = tiny()
    together = model(Packed.from_sequences(SEQUENCES), PROMPTS)
    apart = [
        model(Packed.from_sequences([s]), [p]) for s, p in zip(SEQUENCES, PROMPTS, strict=True)
    ]
    assert together.values.dtype == together.gate.dtype == torch.float32
    for name in ("values", "overall", "gate"):
        alone = torch.cat([getattr(out, name) for out in apart])
        assert_close(name, getattr(together, name), alone, tolerance=1e-6)


@torch.no_grad()
def test_values_are_read_at_the_last_token_and_the_gate_at_the_prompts():
    model = tiny()
    one = model(Packed.from_sequences([[5, 6, 7, 8]]), [2])
    other = model(Packed.from_sequences([[5, 6, 7, 9]]), [2])
    assert torch.equal(one.gate, other.gate)
    assert not torch.equal(one.values, other.values)
    assert not torch.equal(one.gate, model(Packed.from_sequences([[5, 6, 7, 8]]), [1]).gate)


@torch.no_grad()
def test_a_new_gate_is_the_declared_one():
    torch.manual_seed(0)
    fresh = RewardModel(HybridModel(preset("tiny", num_hidden_layers=2)), LEARNED)
    gate = fresh(Packed.from_sequences([[1, 2]]), [1]).gate
    assert gate.sum().item() == pytest.approx(1)
    assert gate[0].tolist() == pytest.approx([0.5, 0.3, 0.2])


@torch.no_grad()
def test_overall_is_the_trees_weighted_sum_of_raw_values():
    model = tiny(HIERARCHY)
    out = model(Packed.from_sequences(SEQUENCES))
    assert out.gate is None
    weights = torch.tensor([0.5, 0.3 * 0.5, 0.3 * 0.5, 0.2])
    assert model.signals == ("correctness", "constraints", "style", "harmlessness")
    assert_close("overall", out.overall, out.values @ weights)


def test_gradients_reach_only_the_labelled_head():
    model = tiny()
    out = model(Packed.from_sequences(SEQUENCES), PROMPTS)
    (out.values[0, 2] - out.values[1, 2]).backward()
    grad = model.values.weight.grad
    assert grad[2].abs().sum() > 0
    assert grad[[0, 1, 3]].abs().sum() == 0
    assert model.gate.weight.grad is None
    assert model.trunk.embed_tokens.weight.grad.abs().sum() > 0


def test_overall_trains_a_learned_gate_alone_and_every_head_without_one():
    model = tiny()
    model(Packed.from_sequences(SEQUENCES), PROMPTS).overall.sum().backward()
    assert model.values.weight.grad is None
    assert model.gate.weight.grad.abs().sum() > 0
    declared = tiny(HIERARCHY)
    declared(Packed.from_sequences(SEQUENCES)).overall.sum().backward()
    assert (declared.values.weight.grad.abs().sum(1) > 0).all()


def test_the_routers_loss_is_handed_on():
    model = tiny(HIERARCHY)
    assert model(Packed.from_sequences(SEQUENCES)).aux_loss.item() > 0
    model.trunk.config.router_aux_loss_coef = 0.0
    assert model(Packed.from_sequences(SEQUENCES)).aux_loss is None


@torch.no_grad()
def test_heads_stay_fp32_over_a_bf16_trunk_and_under_autocast():
    model = tiny(HIERARCHY)
    model.trunk.to(torch.bfloat16)
    hidden = model.trunk.run(Packed.from_sequences([[1, 2]])).hidden[-1:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = model(Packed.from_sequences([[1, 2]])).values
    assert values.dtype == torch.float32
    assert_close("values", values, hidden.float() @ model.values.weight.T, tolerance=2e-2)


@torch.no_grad()
def test_save_and_load_is_bitwise_and_the_folder_is_an_ordinary_checkpoint(tmp_path):
    model = tiny()
    model.save(tmp_path)
    again = RewardModel.load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.version == model.version
    assert not again.training
    packed = Packed.from_sequences(SEQUENCES)
    assert torch.equal(model(packed, PROMPTS).overall, again(packed, PROMPTS).overall)
    trunk = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(trunk.run(packed).hidden, model.trunk.run(packed).hidden)
    told = json.loads((tmp_path / REWARD_FILE).read_text())
    assert told["signals"] == ["correctness", "constraints", "style", "harmlessness"]
    assert told["hierarchy"]["gate"] == "learned"
    assert told["version"] == model.version


def test_the_version_names_tree_and_heads():
    assert tiny().version == tiny().version
    assert tiny().version.startswith(LEARNED.version)
    other = tiny()
    torch.nn.init.zeros_(other.values.weight)
    assert other.version != tiny().version


def test_seeded_heads_leave_the_random_state_alone():
    trunk = tiny().trunk
    before = torch.random.get_rng_state()
    one, two = RewardModel(trunk, HIERARCHY, seed=1), RewardModel(trunk, HIERARCHY, seed=1)
    assert torch.equal(one.values.weight, two.values.weight)
    other = RewardModel(trunk, HIERARCHY, seed=2)
    assert not torch.equal(one.values.weight, other.values.weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_tree_without_heads_is_an_error():
    tree = {"correctness": {"signals": {"sum": {"verifiers": ["math"], "head": False}}}}
    rules_only = Hierarchy.model_validate({"dimensions": tree})
    with pytest.raises(ValueError, match="declares no head, so there is nothing to train"):
        RewardModel(tiny().trunk, rules_only)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "hierarchy.gate = learned reads the prompts; pass prompt_lengths"),
        ([1, 1], "2 prompt lengths for 4 sequences"),
        ([1, 2, 1, 1], "sequence 1: prompt length 2, expected 1 to 1"),
        ([0, 1, 1, 1], "sequence 0: prompt length 0, expected 1 to 3"),
    ],
)
def test_wrong_prompt_lengths_are_errors(prompts, message):
    with pytest.raises(ValueError, match=message):
        tiny()(Packed.from_sequences(SEQUENCES), prompts)


def test_a_folder_that_is_no_reward_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no reward.json; expected the artifact of a reward"):
        RewardModel.load(tmp_path)
    (tmp_path / REWARD_FILE).write_text('{"format": 1,')
    with pytest.raises(ValueError, match=r"reward.json: cannot read it .* train the reward stage"):
        RewardModel.load(tmp_path)


def test_files_that_do_not_belong_together_are_errors(tmp_path):
    tiny().save(tmp_path)
    path, told = tmp_path / REWARD_FILE, json.loads((tmp_path / REWARD_FILE).read_text())

    def expect(message: str, **changes: object) -> None:
        path.write_text(json.dumps({**told, **changes}))
        with pytest.raises(ValueError, match=message):
            RewardModel.load(tmp_path)
        path.write_text(json.dumps(told))

    expect("format 2, expected 1", format=2)
    expect(r"signals \('style',\) are not the heads", signals=["style"])
    expect("version .* but reward.json says x; one of the files was changed", version="x")
    heads = load_file(tmp_path / HEADS_FILE)
    save_file({"values.weight": heads["values.weight"]}, tmp_path / HEADS_FILE)
    expect("do not fit reward.json beside it")
    (tmp_path / HEADS_FILE).unlink()
    expect("no heads.safetensors; the reward artifact is not complete")
