"""Weights by file arrive bit for bit, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from align.lora import LoraConfig, apply_lora
from model import HybridForCausalLM
from model.parallel.apply import parallelize
from model.parallel.expert import local
from model.parallel.mesh import ParallelConfig, open_mesh
from rollout.sync import checksums, copy_weights, weights
from rollout.transport import (
    PUSH,
    read_push,
    read_weights,
    write_weights,
)
from tests.model.parallel.world import world
from tests.rollout.test_sync import make_model


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 1 << 30])
def test_files_hold_every_bit_whatever_the_size_of_a_shard(tmp_path: Path, shard_bytes: int):
    source, target = make_model(0, tie_word_embeddings=True), make_model(1)
    path = write_weights(tmp_path, weights(source), version=3, shard_bytes=shard_bytes)
    push = read_push(path)
    assert (push.version, push.holds) == (3, "weights")
    num_files = len({*push.files.values()})
    assert num_files == (
        1 if shard_bytes > 1e6 else len(push.files) if shard_bytes == 1 else num_files
    )
    assert shard_bytes != 20_000 or 1 < num_files < len(push.files)
    copy_weights(target, read_weights(path))
    assert checksums(weights(target)) == push.checksums == checksums(weights(source))


def test_a_push_that_breaks_off_leaves_nothing_behind(tmp_path: Path):
    def breaking():
        yield "a", torch.ones(2)
        raise RuntimeError("the source is gone")

    earlier = write_weights(tmp_path, [("a", torch.zeros(2))], version=1)
    with pytest.raises(RuntimeError, match="the source is gone"):
        write_weights(tmp_path, breaking(), version=2)
    assert [path.name for path in tmp_path.iterdir()] == [earlier.name]


def test_old_versions_go_and_the_one_before_stays(tmp_path: Path):
    for version in range(5):
        write_weights(tmp_path, [("a", torch.zeros(2))], version=version)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["version-00000003", "version-00000004"]


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path):
    path = write_weights(tmp_path, [("a", torch.zeros(2))], version=0)
    (path / "weights-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights-00001.safetensors: .*; push the weights again"):
        dict(read_weights(path))
    (path / PUSH).write_text("{")
    with pytest.raises(ValueError, match=r"no whole push.json .*write_weights made"):
        read_push(path)


def _gathered(kind: str) -> dict[str, str]:
    """Checksums of the stream of a model that two ranks hold in parts."""
    model = make_model(0)
    if kind.startswith("experts"):
        config = ParallelConfig(expert=2)
        parallelize(model, open_mesh(config, device_type="cpu"), config)
    policy = adapted(model) if kind.endswith("adapters") else model
    if kind.startswith("fsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(policy, mesh=mesh)
    return checksums(weights(policy))


def adapted(model: HybridForCausalLM) -> PeftModel:
    """With adapters on attention and experts that change something."""
    policy = apply_lora(model, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                # along all that is not shared
                local(parameter).copy_(torch.linspace(-0.1, 0.1, len(parameter))[:, None])
    return policy


@pytest.mark.multi
@pytest.mark.parametrize("kind", ["experts", "fsdp", "experts-adapters", "fsdp-adapters"])
def test_a_sharded_source_streams_what_one_process_holds(tmp_path: Path, kind: str):
    model = make_model(0)
    one = checksums(weights(adapted(model) if kind.endswith("adapters") else model))
    assert (one == checksums(weights(make_model(0)))) != kind.endswith("adapters")
    assert world(2, _gathered, kind, tmp_path) == [one, one]
