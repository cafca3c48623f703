"""Folders in every layout: bitwise there and back, opened by transformers, in bounded memory."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MiniMaxForCausalLM

from model import HybridConfig, HybridForCausalLM, Packed, preset
from model.checkpoints import (
    INDEX,
    WEIGHTS,
    ShardWriter,
    read_folder_config,
    shards_of,
    stream_folder,
    stream_logprobs,
    write_folder,
)
from model.layouts import read_tensors, tensor_names, tensor_shapes
from tests.helpers import assert_close

TOKENS = torch.tensor([5, 9, 1, 30, 2, 2, 17])


def small(**changes: object) -> HybridConfig:
    values = {
        "vocab_size": 33,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "rotary_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "initializer_range": 0.3,
    }
    return preset("tiny", **{**values, **changes})


def saved(folder: Path, **changes: object) -> HybridForCausalLM:
    torch.manual_seed(0)
    model = HybridForCausalLM(small(**changes)).eval()
    model.save_pretrained(folder)
    return model


def rewrite(source: Path, target: Path, layout: str, **options: object) -> None:
    target.mkdir()
    config, _ = read_folder_config(source)
    write_folder(stream_folder(source), target, config=config, layout=layout, **options)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return dict(stream_folder(folder))


def logprobs_of(model: torch.nn.Module) -> Tensor:
    """Through the padded call that transformers' class and ours share."""
    with torch.no_grad():
        logits = model(input_ids=TOKENS[None]).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, TOKENS[1:, None])[:, 0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["text-01", "vllm"])
def test_layout_round_trips_bitwise(tmp_path: Path, layout: str, tied: bool):
    model = saved(tmp_path / "a", tie_word_embeddings=tied)
    rewrite(tmp_path / "a", tmp_path / "b", layout, shard_bytes=9000)
    rewrite(tmp_path / "b", tmp_path / "c", "transformers-disk")
    first, last = weights_of(tmp_path / "a"), weights_of(tmp_path / "c")
    if tied and layout == "vllm":
        # it has no tied head, so one came to be a tensor of its own
        assert torch.equal(last.pop("lm_head.weight"), first["model.embed_tokens.weight"])
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    again = HybridForCausalLM.from_pretrained(tmp_path / "c").eval()
    assert torch.equal(logprobs_of(again), logprobs_of(model))


def test_text_01_folder_goes_to_ours_and_back_byte_for_byte(tmp_path: Path):
    saved(tmp_path / "a")
    rewrite(tmp_path / "a", tmp_path / "b", "text-01", shard_bytes=9000)
    rewrite(tmp_path / "b", tmp_path / "c", "transformers-disk")
    rewrite(tmp_path / "c", tmp_path / "d", "text-01", shard_bytes=9000)
    files = {file.name for file in (tmp_path / "b").iterdir()}
    assert len(files) > 3
    assert files == {file.name for file in (tmp_path / "d").iterdir()}
    for file in files:
        there, back = (tmp_path / folder / file for folder in ("b", "d"))
        assert there.read_bytes() == back.read_bytes(), file


def test_transformers_opens_what_was_written_and_agrees(tmp_path: Path):
    model = saved(tmp_path / "a", lightning_norm_eps=1e-6)
    rewrite(tmp_path / "a", tmp_path / "b", "transformers-disk", shard_bytes=9000)
    theirs = MiniMaxForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert type(theirs).__module__.startswith("transformers.")
    assert_close("logprobs", logprobs_of(theirs), logprobs_of(model))


@pytest.mark.parametrize("layout", ["transformers-disk", "text-01", "vllm"])
def test_blocks_one_by_one_give_the_whole_models_logprobs(tmp_path: Path, layout: str):
    model = saved(tmp_path / "a", postnorm=False, lm_head_fp32=True)
    rewrite(tmp_path / "a", tmp_path / "b", layout, shard_bytes=9000)
    with torch.no_grad():
        hidden = model.model.run(Packed.from_sequences([TOKENS.tolist()])).hidden
        rows = model.logits(hidden)[:-1].log_softmax(-1)
    assert_close(
        "logprobs",
        stream_logprobs(tmp_path / "b", TOKENS),
        rows.gather(1, TOKENS[1:, None])[:, 0],
    )


def test_rounding_to_bf16_is_of_the_weights_alone(tmp_path: Path):
    saved(tmp_path / "a")
    rewrite(tmp_path / "a", tmp_path / "b", "text-01", dtype=torch.bfloat16)
    written = weights_of(tmp_path / "b")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    rounded = stream_logprobs(tmp_path / "a", TOKENS, dtype=torch.bfloat16)
    assert torch.equal(stream_logprobs(tmp_path / "b", TOKENS), rounded)
    assert not torch.equal(stream_logprobs(tmp_path / "a", TOKENS), rounded)


def test_shards_hold_what_the_index_says(tmp_path: Path):
    saved(tmp_path / "a")
    rewrite(tmp_path / "a", tmp_path / "b", "vllm", shard_bytes=9000)
    index = json.loads((tmp_path / "b" / INDEX).read_text())
    total = 0
    for shard, names in shards_of(tmp_path / "b").items():
        held = load_file(tmp_path / "b" / shard)
        assert set(held) == set(names)
        size = sum(tensor.nbytes for tensor in held.values())
        assert size <= 9000 or len(held) == 1
        total += size
    assert total == index["metadata"]["total_size"]
    assert not (tmp_path / "b" / WEIGHTS).exists()


def test_a_model_of_456b_is_never_held_beyond_one_shard(tmp_path: Path):
    config = preset("minimax-text-01")
    shapes = tensor_shapes(config, "text-01")
    alive, peak, written = 0, 0, 0

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    def stream():
        nonlocal alive, peak
        for name, shape in shapes.items():
            tensor = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            alive += tensor.nbytes
            weakref.finalize(tensor, gone, tensor.nbytes)
            peak = max(peak, alive)
            yield name, tensor

    def save(tensors: dict[str, Tensor], file: Path) -> None:
        nonlocal written
        written += sum(tensor.nbytes for tensor in tensors.values())
        file.touch()

    writer = ShardWriter(tmp_path, shard_bytes=2**32, save=save)
    for name, tensor in stream():
        writer.add(name, tensor)
    writer.close()
    gc.collect()
    assert written == writer.total_bytes == 2 * 456_089_655_296
    largest = 2 * 200_064 * 6144
    # what waits, the one that did not fit, and the one that the loop still names
    assert peak <= 2**32 + 2 * largest
    assert len(json.loads((tmp_path / INDEX).read_text())["weight_map"]) == len(shapes)


def test_shapes_are_those_of_the_model():
    config = small(tie_word_embeddings=True)
    written = HybridForCausalLM(config).state_dict()
    native = tensor_shapes(config, "native")
    assert native == {name: tuple(written[name].shape) for name in native}
    disk = tensor_shapes(config, "transformers-disk")
    assert tuple(disk) == tensor_names(config, "transformers-disk")
    streams = {name: torch.empty(shape) for name, shape in disk.items()}
    fused = read_tensors(streams.items(), config=config, layout="transformers-disk")
    assert {name: tuple(tensor.shape) for name, tensor in fused} == native


# Refusals


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no config\.json, expected a checkpoint folder"):
        read_folder_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type = 'llama', expected minimax"):
        read_folder_config(tmp_path)
    with pytest.raises(ValueError, match=r"no model\.safetensors or"):
        shards_of(tmp_path)


def test_shard_that_the_index_names_must_be_there(tmp_path: Path):
    saved(tmp_path / "a")
    rewrite(tmp_path / "a", tmp_path / "b", "text-01", shard_bytes=9000)
    shard = sorted((tmp_path / "b").glob("model-*"))[1]
    shard.rename(tmp_path / "away")
    with pytest.raises(ValueError, match=f"no {shard.name}, which"):
        list(stream_folder(tmp_path / "b"))
    (tmp_path / "b" / "model-00001-of").touch()
    other = sorted((tmp_path / "b").glob("model-*.safetensors"))[0]
    shard.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=f"{shard.name}: no tensor"):
        list(stream_folder(tmp_path / "b"))


def test_incomplete_stream_is_refused(tmp_path: Path):
    model = saved(tmp_path / "a")
    stream = list(stream_folder(tmp_path / "a"))
    with pytest.raises(ValueError, match="1 tensors are missing"):
        write_folder(stream[1:], tmp_path, config=model.config, layout="text-01")
