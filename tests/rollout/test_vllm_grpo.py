"""Grpo through vLLM and a worker is grpo through the native engine: same samples, same losses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from align.course import Step
from align.data.batch import Batch
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
from rollout.canary import Canary, ProofError
from rollout.sync import weights
from rollout.vllm_backend import VllmEngine
from tests.align import small
from tests.align.faults import FAULTS, adapted, spoiled
from tests.rollout.live import make_worker, served

pytest.importorskip("vllm", reason="vllm is not installed here; run make test-vllm")
pytestmark = pytest.mark.vllm

# vLLM's attention on a CPU has no heads of 8
SHAPE = {"head_dim": 32, "rotary_dim": 16}


class ShareScorer:
    """Reward is the share of the letter t."""

    version = "share@1"

    def score(self, items: Sequence[Item]) -> list[Score]:
        return [Score(item.response.count("t") / len(item.response)) for item in items]


class Seen(GrpoCourse):
    """Keeps what was sampled, with the engine's log-probabilities."""

    batches: list[Batch]

    def step(self, index: int) -> Step:
        step = super().step(index)
        self.batches.extend(step.batches)
        return step


@contextmanager
def rollout(backend: str, folder: Path) -> Iterator[RolloutConfig]:
    if backend == "remote":
        with served(make_worker(small.model(**SHAPE), weights_root=folder)) as live:
            yield RolloutConfig(workers=(live.url,))
    else:
        yield RolloutConfig(backend=backend, cache_gib=0.25)


def ten_steps(
    folder: Path, backend: str, *, lora: bool
) -> tuple[list[dict[str, float]], list[Batch]]:
    """Lines of metrics, and what was sampled."""
    policy = small.model(**SHAPE)
    trained = apply_lora(policy, LoraConfig(rank=4), seed=0) if lora else policy
    items = tuple(
        Prompt(
            PromptRow(({"role": "user", "content": "?"},), Origin(f"p.jsonl:{i + 1}")),
            tuple(range(20 + i, 24 + 2 * i)),
        )
        for i in range(5)
    )
    job = small.job(folder)
    with rollout(backend, folder) as source:
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
            # the engine's own numbers are in the loss
            behaviour="engine",
            max_concurrent=8,
            rollout=source,
        )
        course = Seen(
            config,
            job,
            policy=trained,
            reference=None,
            prompts=Prompts(items, ()),
            tools=Tools(small.tokenizer(), ShareScorer()),
        )
        course.batches = []
        try:
            train(course, trained, config=config, job=job)
        finally:
            course.close()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], course.batches


@pytest.mark.parametrize("lora", [False, True])
def test_ten_steps_through_each_backend_have_the_same_samples_and_losses(
    tmp_path: Path, lora: bool
):
    lines, sampled = ten_steps(tmp_path / "native", "native", lora=lora)
    assert len(lines) == 10
    assert len({line["loss"] for line in lines}) > 5
    for backend in ("vllm", "remote"):
        told, theirs = ten_steps(tmp_path / backend, backend, lora=lora)
        for one, two in zip(sampled, theirs, strict=True):
            assert torch.equal(one.packed.tokens, two.packed.tokens), backend
            assert torch.equal(one.weights, two.weights), backend
            gaps = one.behaviour_logprobs - two.behaviour_logprobs
            assert gaps.abs().max() <= 1e-4, backend
        for here, there in zip(lines, told, strict=True):
            for key in ("loss", "grad_norm", "reward/mean"):
                assert abs(here[key] - there[key]) <= 1e-4, (backend, key, here["step"])
            assert there["engine/gap_max"] <= 1e-4


def vllm_source(policy: torch.nn.Module) -> VllmSource:
    return VllmSource(
        policy,
        max_concurrent=4,
        max_tokens=64,
        cache_bytes=2**28,
        canary=Canary.of(small.VOCAB, max_tokens=64),
    )


def test_each_planted_fault_is_found_at_the_push(monkeypatch: pytest.MonkeyPatch):
    source = vllm_source(adapted())
    source.refresh(0)
    pushed = VllmEngine.update_weights
    for version, fault in enumerate(FAULTS, 1):

        def spoiling(engine, stream, version, fault=fault):
            pushed(engine, weights(spoiled(fault)), version)

        monkeypatch.setattr(VllmEngine, "update_weights", spoiling)
        message = f"vllm: it does not hold version {version}; first differing tensor: '"
        with pytest.raises(ProofError, match=message):
            source.refresh(version)
    monkeypatch.setattr(VllmEngine, "update_weights", pushed)
    source.refresh(len(FAULTS) + 1)
    source.engine.close()


def test_stale_weights_are_found_whatever_version_they_claim(monkeypatch: pytest.MonkeyPatch):
    policy = small.model(**SHAPE)
    source = vllm_source(policy)
    source.refresh(0)
    with torch.no_grad():
        policy.model.norm.weight.mul_(2)

    def nothing(engine, stream, version):
        engine.policy_version = version

    monkeypatch.setattr(VllmEngine, "update_weights", nothing)
    with pytest.raises(ProofError, match=r"first differing tensor: 'model\.norm\.weight'"):
        source.refresh(1)
    # and where the weights are held and something else is computed
    monkeypatch.setattr("align.vllm_source.checksums", lambda stream: {})
    with pytest.raises(ProofError, match="engine 0: log-probabilities of the canary differ"):
        source.refresh(2)
    source.engine.close()
