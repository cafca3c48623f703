"""The model of the communication volume says what is really sent."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import volume
from model import HybridForCausalLM, Packed, preset
from model.parallel import collectives
from model.parallel.apply import parallelize
from model.parallel.mesh import ParallelConfig, open_mesh
from tests.model.parallel.world import world
from tests.model.setting import random_sequences

TOKENS = 96
LAYERS = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}


def counted(parallel: ParallelConfig) -> dict[str, int]:
    """Bytes that this rank receives in one step, by collective."""
    seen: Counter[str] = Counter()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    gather, scatter, exchange = (
        collectives._gather,
        collectives._reduce_scatter,
        dist.all_to_all_single,
    )

    def gathers(out: torch.Tensor, x: torch.Tensor, **keys: Any) -> Any:
        seen["gather"] += (ranks - 1) * x.nbytes
        return gather(out, x, **keys)

    def scatters(out: torch.Tensor, x: torch.Tensor, **keys: Any) -> Any:
        seen["gather"] += (ranks - 1) * out.nbytes
        return scatter(out, x, **keys)

    def exchanges(
        out: torch.Tensor, x: torch.Tensor, receive: list[int], send: list[int], **keys: Any
    ) -> Any:
        row = out[:1].nbytes
        name = "exchange" if out.is_floating_point() and out.shape[1:] != (1,) else "tables"
        seen[name] += row * (sum(receive) - receive[rank])
        return exchange(out, x, receive, send, **keys)

    collectives._gather, collectives._reduce_scatter = gathers, scatters
    dist.all_to_all_single = exchanges
    torch.manual_seed(0)
    model = HybridForCausalLM(preset("tiny", **LAYERS)).train()
    parallelize(model, open_mesh(parallel, device_type="cpu"), parallel)
    model.model.checkpointing = "full"
    packed = Packed.from_sequences(random_sequences([TOKENS]))
    out = model(packed=packed, targets=packed.tokens)
    (out.aux_loss - out.logprobs.sum()).backward()
    return dict(seen)


@pytest.mark.multi
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_shared_row_moves_what_the_model_says(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # the step below is in fp32
    monkeypatch.setattr(volume, "LOW_BYTES", 4)
    said = volume.sequence_volume(preset("tiny", **LAYERS), TOKENS, ranks)
    for found in world(ranks, counted, ParallelConfig(sequence=ranks), tmp_path):
        assert found["exchange"] == said.heads
        assert found["gather"] == said.states + said.logprobs


@pytest.mark.multi
def test_shared_experts_move_what_the_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(volume, "LOW_BYTES", 4)
    said = volume.expert_volume(preset("tiny", **LAYERS), TOKENS, 2, dispatches=2)
    # both ranks have the same row, so that between them every place leaves its rank once
    found = world(2, counted, ParallelConfig(expert=2), tmp_path)
    assert sum(rank["exchange"] for rank in found) == 2 * said.experts
