"""A stage in fp64 rounds at 1e-16 wherever it computes, and leaves fp64, equal to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from align.engines import RolloutConfig
from align.loop import TrainConfig
from align.lora import LoraConfig
from align.policy import load_policy
from align.trainers.lm import open_start
from model.checkpoints import opened_dtype
from model.parallel.mesh import ParallelConfig
from reward.scorer import load_scorer
from reward.types import Item
from tests.align import small
from tests.align.test_parallel import TIMES, Run, climb, lines, weights
from tests.align.trainers import test_grpo
from tests.align.trainers.test_reward import write_pairs

# of numbers that fp32 would give 1e-7 apart
BOUND = 1e-11


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("sft", None), ("sft", LoraConfig(rank=2)), ("dpo", None), ("reward", None), ("grpo", None)],
)
def test_rows_packed_otherwise_give_the_same_numbers(
    tmp_path: Path, kind: str, lora: LoraConfig | None
) -> None:
    small.start(tmp_path / "start")
    write_pairs(tmp_path / "rewards.jsonl", 20)
    for name, capacity in (("wide", 128), ("narrow", 56)):
        (tmp_path / name).mkdir()
        folder, alone = tmp_path / name, ParallelConfig()
        climb(Run(kind, folder, alone, lora, precision="fp64", sequence_tokens=capacity))
    told, wanted = lines(tmp_path / "narrow"), lines(tmp_path / "wide")
    assert len(told) == len(wanted) > 1
    for line, other in zip(told, wanted, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - TIMES:
            assert line[key] == pytest.approx(other[key], rel=BOUND, abs=BOUND), key
        # the engine's own forwards, of which fp32 leaves 1e-7
        assert line.get("engine/gap_max", 0.0) < BOUND
    made = weights(tmp_path / "narrow", kind)
    assert {tensor.dtype for tensor in made.values()} == {torch.float64}
    for name, tensor in weights(tmp_path / "wide", kind).items():
        assert torch.equal(made[name], tensor), name


def test_what_was_saved_in_fp64_is_read_in_fp64_and_the_rest_in_fp32(tmp_path: Path) -> None:
    start = small.start(tmp_path / "start")
    assert opened_dtype(start) == load_policy(start)[0].dtype == torch.float32
    write_pairs(tmp_path / "rewards.jsonl", 20)
    for kind in ("sft", "reward"):
        (tmp_path / kind).mkdir()
        climb(Run(kind, tmp_path / kind, ParallelConfig(), precision="fp64"))
    policy, judge = tmp_path / "sft" / "artifact", tmp_path / "reward" / "artifact"
    assert opened_dtype(policy) == load_policy(policy)[0].dtype == torch.float64
    assert opened_dtype(policy, "cuda") == torch.float32
    scorer = load_scorer(judge, lambda item: (5, 6, *map(ord, item.response)), encode_prompt=_two)
    value = scorer.score([Item(({"role": "user", "content": "?"},), "ab")])[0].value
    assert float(torch.tensor(value, dtype=torch.float32)) != value


def _two(item: Item) -> tuple[int, ...]:
    return 5, 6


def test_a_gpu_is_refused(tmp_path: Path) -> None:
    job = small.job(tmp_path, small.start(tmp_path / "start"))
    job = dataclasses.replace(job, accelerator=_on_gpu(job.accelerator))
    with pytest.raises(
        ValueError, match="stage: precision = fp64 on cuda, where some kernels have"
    ):
        open_start(TrainConfig(precision="fp64"), job)


def _on_gpu(accelerator: Any) -> Any:
    told = {"num_processes": 1, "distributed_type": accelerator.distributed_type}
    return SimpleNamespace(device=torch.device("cuda"), is_fsdp2=False, **told)


def test_who_would_round_is_refused() -> None:
    with pytest.raises(
        ValidationError, match="precision = fp64 with backend = trl, expected native"
    ):
        TrainConfig(precision="fp64", backend="trl")
    for rollout in (RolloutConfig(workers=("http://a:1",)), RolloutConfig(backend="vllm")):
        with pytest.raises(ValidationError, match=r"precision = fp64 with rollout\.workers or"):
            test_grpo.config(precision="fp64", rollout=rollout)
