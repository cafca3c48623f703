"""Weight streams: complete, by name, merged without touching the trainer's bits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from model import HybridForCausalLM, Packed, preset
from rollout.sync import checksums, copy_weights, weights
from tests.helpers import assert_close


def make_model(seed: int = 0, **changes: object) -> HybridForCausalLM:
    torch.manual_seed(seed)
    config = preset(
        "tiny",
        vocab_size=32,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        head_dim=8,
        rotary_dim=8,
        layer_types=["linear_attention", "full_attention"],
        initializer_range=0.2,
        **changes,
    )
    return HybridForCausalLM(config)


def with_adapters(model: HybridForCausalLM):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "qkv_proj", "out_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return wrapped


def test_a_stream_into_another_model_makes_it_the_same():
    source, target = make_model(0), make_model(1)
    copy_weights(target, weights(source))
    assert checksums(weights(target)) == checksums(weights(source))


def test_adapters_are_merged_in_the_stream_and_stay_apart_in_the_trainer():
    trainer = with_adapters(make_model(0))
    before = checksums(trainer.state_dict().items())
    engine = make_model(1)
    copy_weights(engine, weights(trainer))
    assert checksums(trainer.state_dict().items()) == before
    packed = Packed.from_sequences([[1, 2, 3, 4, 5], [6, 7]])
    targets = torch.tensor([2, 3, 4, 5, 0, 7, 0])
    trainer.eval()
    with torch.no_grad():
        on = trainer(packed=packed, targets=targets).logprobs
        merged = engine.eval()(packed=packed, targets=targets).logprobs
        with trainer.disable_adapter():
            off = trainer(packed=packed, targets=targets).logprobs
    assert_close("merged", merged, on)
    assert (on - off).abs().max() > 0.01, "the adapters must matter for this test to say anything"


def test_a_tied_head_needs_only_one_of_its_names():
    source, target = (
        make_model(0, tie_word_embeddings=True),
        make_model(1, tie_word_embeddings=True),
    )
    stream = [(n, t) for n, t in weights(source) if n != "lm_head.weight"]
    copy_weights(target, stream)
    assert checksums(weights(target)) == checksums(weights(source))


def changed(name: str, tensor: torch.Tensor | None, *, rename: str = "") -> list:
    stream = dict(weights(make_model(0)))
    old = stream.pop(name)
    if tensor is not None or rename:
        stream[rename or name] = old if tensor is None else tensor
    return list(stream.items())


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (
            changed("lm_head.weight", None, rename="head.weight"),
            r"weight 'head.weight' is unexpected: the model has \d+ tensors.*adapters merged",
        ),
        (
            changed("model.norm.weight", torch.zeros(31)),
            r"weight 'model.norm.weight' has shape \(31,\), the model's is \(32,\)",
        ),
        (
            changed("model.norm.weight", None),
            r"1 of \d+ weights are missing from the stream, first 'model.norm.weight'",
        ),
    ],
)
def test_a_wrong_stream_names_its_tensor(stream: list, message: str):
    with pytest.raises(ValueError, match=message):
        copy_weights(make_model(1), stream)


def test_checksums_see_every_bit_and_work_in_bf16():
    tensor = torch.ones(5, dtype=torch.bfloat16)
    other = tensor.clone()
    other[3] = torch.tensor(1 + 2**-7, dtype=torch.bfloat16)
    one, same, changed_bit = (checksums([("w", t)])["w"] for t in (tensor, tensor.clone(), other))
    assert one == same
    assert one != changed_bit
    assert checksums([("s", torch.tensor(1.0))])["s"] != one
