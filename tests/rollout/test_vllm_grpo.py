"""Ten steps of grpo through vLLM are those through the native engine: same samples, same losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from align.data.rows import Origin, PromptRow
from align.data.sources import DataConfig
from align.engines import RolloutConfig
from align.loop import train
from align.lora import LoraConfig, apply_lora
from align.losses.policy import PolicyLossConfig
from align.optim import OptimConfig
from align.prompts import Prompt, Prompts
from align.trainers.grpo import GrpoConfig, GrpoCourse, Tools
from align.vllm_source import VllmSource
from reward.types import Item, Score
from rollout.vllm_backend import VllmEngine
from tests.align import small

pytest.importorskip("vllm", reason="vllm is not installed here; run make test-vllm")
pytestmark = pytest.mark.vllm


class ShareScorer:
    """Reward is the share of the letter t."""

    version = "share@1"

    def score(self, items: Sequence[Item]) -> list[Score]:
        return [Score(item.response.count("t") / len(item.response)) for item in items]


def losses(folder: Path, backend: str, *, lora: bool) -> list[dict[str, float]]:
    config = GrpoConfig(
        data=(DataConfig(task="sort", num_rows=8),),
        sequence_tokens=64,
        max_steps=10,
        prompts_per_step=2,
        group_size=4,
        max_new_tokens=6,
        temperature=0.9,
        optim=OptimConfig(lr=3e-3, schedule="constant"),
        loss=PolicyLossConfig(objective="dapo"),
        max_concurrent=8,
        rollout=RolloutConfig(backend=backend, cache_gib=0.25),
    )
    # vLLM's attention on a CPU has no heads of 8
    policy = small.model(head_dim=32, rotary_dim=16)
    trained = apply_lora(policy, LoraConfig(rank=4), seed=0) if lora else policy
    items = tuple(
        Prompt(
            PromptRow(({"role": "user", "content": "?"},), Origin(f"p.jsonl:{i + 1}")),
            tuple(range(20 + i, 24 + 2 * i)),
        )
        for i in range(5)
    )
    job = small.job(folder)
    course = GrpoCourse(
        config,
        job,
        policy=trained,
        reference=None,
        prompts=Prompts(items, ()),
        tools=Tools(small.tokenizer(), ShareScorer()),
    )
    train(course, trained, config=config, job=job)
    course.close()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("lora", [False, True])
def test_ten_steps_give_the_native_engines_losses(tmp_path: Path, lora: bool):
    here = losses(tmp_path / "native", "native", lora=lora)
    there = losses(tmp_path / "vllm", "vllm", lora=lora)
    assert len(here) == len(there) == 10
    assert len({line["loss"] for line in here}) > 5
    for one, other in zip(here, there, strict=True):
        for key in ("loss", "reward/mean"):
            assert abs(one[key] - other[key]) <= 1e-4, (key, one["step"])
        assert other["engine/gap_max"] <= 1e-4


def test_permuted_expert_and_stale_weights_are_found_at_the_push(monkeypatch: pytest.MonkeyPatch):
    policy = small.model(head_dim=32, rotary_dim=16)
    source = VllmSource(policy, max_concurrent=4, max_tokens=64, cache_bytes=2**28)
    source.refresh(0)
    victim = "model.layers.1.mlp.experts.down_proj"
    pushed = VllmEngine.update_weights

    def permuted(engine, stream, version):
        pushed(engine, ((n, t.flip(0) if n == victim else t) for n, t in stream), version)

    monkeypatch.setattr(VllmEngine, "update_weights", permuted)
    with pytest.raises(RuntimeError, match=f"does not hold version 1; first .* '{victim}"):
        source.refresh(1)

    def nothing(engine, stream, version):
        engine.policy_version = version

    with torch.no_grad():
        policy.model.norm.weight.mul_(2)
    monkeypatch.setattr(VllmEngine, "update_weights", pushed)
    source.refresh(2)
    with torch.no_grad():
        policy.model.norm.weight.mul_(2)
    monkeypatch.setattr(VllmEngine, "update_weights", nothing)
    with pytest.raises(RuntimeError, match=r"first differing tensor: 'model\.norm\.weight'"):
        source.refresh(3)
    source.engine.close()
