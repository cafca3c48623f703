"""Whole runs of online RL: they learn, go on bit for bit after a kill, and take any judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from align.course import Step
from align.data.sources import DataConfig
from align.loop import train
from align.losses.policy import PolicyLossConfig
from align.optim import OptimConfig
from align.policy import load_policy
from align.prompts import open_scorer
from align.trainers.grpo import GrpoCourse, Tools, run
from reward.hierarchy import HIERARCHY
from reward.model import RewardModel
from reward.scorer import InProcessScorer
from reward.serving.judging import Service
from reward.serving.judging import Settings as ServiceSettings
from rollout.sync import checksums
from tests.align import small
from tests.align.trainers.grpo_setting import ShareScorer, config, course, lines, prompts
from tests.helpers import slow
from tests.reward.live import served


class Killed(Exception):
    pass


class Mortal(GrpoCourse):
    """Dies at the beginning of step `last`."""

    last = 3

    def step(self, index: int) -> Step:
        if index == self.last:
            raise Killed
        return super().step(index)


def test_killed_in_mid_buffer_a_run_ends_with_the_same_bits(tmp_path: Path):
    settings = config(max_steps=6, updates_per_rollout=3, save_every_steps=2)

    def attempt(folder: Path, kind: type[GrpoCourse]) -> nn.Module:
        model = small.model()
        job = small.job(folder)
        tools = Tools(small.tokenizer(), ShareScorer())
        made = kind(settings, job, policy=model, reference=None, prompts=prompts(), tools=tools)
        train(made, model, config=settings, job=job)
        return model

    whole = attempt(tmp_path / "whole", GrpoCourse)
    # the checkpoint after step 2 of 3 of the first rollout, then death one step later
    with pytest.raises(Killed):
        attempt(tmp_path / "killed", Mortal)
    resumed = attempt(tmp_path / "killed", GrpoCourse)
    assert checksums(whole.state_dict().items()) == checksums(resumed.state_dict().items())
    timed = {"seconds", "tokens_per_s"}
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "killed"), strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


@pytest.mark.parametrize("objective", ["grpo", *slow("cispo")])
def test_the_rewarded_token_becomes_frequent(tmp_path: Path, objective: str):
    settings = config(
        max_steps=30,
        prompts_per_step=4,
        group_size=8,
        sequence_tokens=512,
        loss=PolicyLossConfig(objective=objective),
        optim=OptimConfig(lr=1e-2, schedule="constant"),
    )
    model, job = small.model(), small.job(tmp_path)
    train(course(settings, job, model), model, config=settings, job=job)
    told = lines(tmp_path)
    first = sum(line["reward/mean"] for line in told[:3]) / 3
    last = sum(line["reward/mean"] for line in told[-3:]) / 3
    assert last > first + 0.3
    assert {"rollout/flat_groups", "rollout/response_tokens", "entropy", "engine/gap"} <= {*told[0]}


def prompt_file(folder: Path) -> tuple[DataConfig, ...]:
    message = {"role": "user", "content": "the cat sat on the"}
    rows = [
        {
            "prompt": [{**message, "content": f"{word} {message['content']}"}],
            "answer": "t",
            "verifier": "exact",
            "arguments": {},
        }
        for word in ("so", "and", "now", "then")
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (DataConfig(path="p.jsonl", split="all"),)


def test_a_stage_runs_from_policy_to_policy(tmp_path: Path):
    settings = config(data=prompt_file(tmp_path), max_steps=2)
    job = small.job(tmp_path / "stage", small.start(tmp_path / "start"), base=tmp_path)
    outcome = run(settings, job)
    assert outcome.metrics["step"] == 2
    assert outcome.data[0]["rows"] == 4
    before, after = (load_policy(folder)[0] for folder in (job.start, job.artifact))
    told = lines(job.folder)[-1]
    assert {"reward/mean", "accuracy/all", "rollout/invalid", "ratio/mean"} <= {*told}
    # nobody answers exactly "t" here, so all groups are flat and nothing moves but rounding
    assert told["rollout/flat_groups"] == 1
    assert (
        checksums(before.state_dict().items()).keys()
        == checksums(after.state_dict().items()).keys()
    )


def unruled_prompts(folder: Path) -> tuple[DataConfig, ...]:
    """Prompts without a verifier, which only a reward model can judge."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"the {word}"}],
            "answer": "",
            "verifier": "",
            "arguments": {},
        }
        for word in ("cat", "hat", "mat")
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (DataConfig(path="q.jsonl", split="all"),)


def test_a_reward_artifact_judges_what_no_rule_can(tmp_path: Path):
    RewardModel(small.model(seed=3).model, HIERARCHY).save(tmp_path / "reward")
    settings = config(data=unruled_prompts(tmp_path), max_steps=2, updates_per_rollout=2)
    start = small.start(tmp_path / "start")
    inputs = {"reward": tmp_path / "reward"}
    job = small.job(tmp_path / "stage", start, base=tmp_path, inputs=inputs)
    run(settings, job)
    told = lines(job.folder)
    assert 0 < told[0]["reward/mean"] < 1
    assert told[0]["reward/std"] > 0
    assert told[0]["rollout/flat_groups"] == 0
    assert "accuracy/all" not in told[0]


def test_a_scoring_service_judges_as_its_artifact_would_here(tmp_path: Path):
    RewardModel(small.model(seed=3).model, HIERARCHY).save(tmp_path / "reward")
    settings = config(data=unruled_prompts(tmp_path), max_steps=1)
    start = small.start(tmp_path / "start")
    own = {"inputs": {"reward": tmp_path / "reward"}}
    here = small.job(tmp_path / "here", start, base=tmp_path, **own)
    run(settings, here)
    judge = open_scorer(here, small.tokenizer())
    assert isinstance(judge, InProcessScorer)
    with served(Service(judge, ServiceSettings(api_key="k"))) as live:
        service = {"reward_url": live.url, "reward_key": "k"}
        there = small.job(tmp_path / "there", start, base=tmp_path, **service)
        run(settings, there)
    told = [lines(job.folder)[0] for job in (here, there)]
    assert told[0]["reward/std"] > 0
    for key in ("reward/mean", "reward/std", "loss", "grad_norm"):
        assert told[1][key] == pytest.approx(told[0][key], abs=1e-5, rel=1e-3)
    wrong = small.job(tmp_path / "wrong", start, reward_url="http://127.0.0.1:9", reward_key="")
    with pytest.raises(RuntimeError, match="no answer within"):
        open_scorer(wrong, small.tokenizer(), deadline_s=0.1)


def test_bf16_steps_compare_with_an_engine_in_bf16(tmp_path: Path):
    settings = config(precision="bf16", updates_per_rollout=2, max_steps=2)
    model, job = small.model(), small.job(tmp_path)
    made = course(settings, job, model)
    train(made, model, config=settings, job=job)
    assert made.source.native.autocast == torch.bfloat16
    told = lines(tmp_path)
    assert told[0]["engine/gap"] < 5e-2
    assert told[0]["ratio/max"] == 1
    assert told[0]["ratio/mean"] == 1
