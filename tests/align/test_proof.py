"""Whatever the engine, a policy that is not the trainer's is found before a step is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.engines import RolloutConfig
from align.prompts import open_engine
from rollout.canary import Canary, ProofError
from rollout.native.engine import NativeEngine
from rollout.sync import copy_weights, weights
from tests.align import small
from tests.align.faults import FAULTS, adapted, spoiled
from tests.align.trainers.grpo_setting import config, course
from tests.rollout.live import make_worker, served


@pytest.mark.parametrize("fault", FAULTS)
def test_the_trainers_own_engine_is_proven_at_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
):
    def opened(policy: Any, **limits: Any) -> NativeEngine:
        return open_engine(spoiled(fault), **limits)

    monkeypatch.setattr("align.engines.open_engine", opened)
    made = course(config(), small.job(tmp_path), adapted())
    with pytest.raises(ProofError, match=r"engine 0: .* canary differ .* differing tensor: '"):
        made.step(0)
    made.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_is_proven_at_the_first_step(tmp_path: Path, fault: str):
    worker = make_worker(small.model(head_dim=32, rotary_dim=16), weights_root=tmp_path)
    push = worker.holder.push

    def spoiling(path: Path, version: int) -> Any:
        push(path, version)
        copy_weights(worker.driver.engine.model, weights(spoiled(fault)))
        return worker.holder.told()

    worker.holder.push = spoiling  # type: ignore[method-assign]
    with served(worker) as live:
        settings = config(rollout=RolloutConfig(workers=(live.url,)))
        made = course(settings, small.job(tmp_path), adapted())
        with pytest.raises(ProofError, match=r"does not hold version 0; first differing tensor: '"):
            made.step(0)
        made.close()


def test_what_is_right_is_proven_and_steps_are_made(tmp_path: Path):
    made = course(config(rollout={"canary_bound": 1e-4}), small.job(tmp_path), adapted())
    assert made.step(0).batches
    made.close()


def test_a_canary_fits_into_a_small_engine():
    canary = Canary.of(50, max_tokens=20, bound=0.5)
    assert [len(prompt) for prompt in canary.prompts] == [3, 10, 10]
    assert (canary.num_tokens, canary.bound) == (10, 0.5)
