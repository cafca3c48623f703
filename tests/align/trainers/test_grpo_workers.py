"""GRPO on rollout workers: the same losses, proven pushes, one rollout ahead, workers that die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from align.course import Step
from align.engines import RolloutConfig
from align.loop import train
from align.lora import LoraConfig, apply_lora
from align.trainers.grpo import GrpoCourse
from rollout.canary import ProofError
from tests.align import small
from tests.align.trainers.grpo_setting import config, course, lines, prompts
from tests.rollout.live import make_worker, served
from tests.serving.live import wait_for

ROOT = Path(__file__).parents[3]


def losses(folder: Path, settings: Any, policy: nn.Module) -> list[dict[str, float]]:
    job = small.job(folder)
    made = course(settings, job, policy)
    try:
        train(made, policy, config=settings, job=job)
    finally:
        made.close()
    return lines(folder)


def test_steps_on_a_worker_that_is_broadcast_to_are_those_in_the_trainer(tmp_path: Path):
    def policy() -> nn.Module:
        return apply_lora(small.model(), LoraConfig(rank=2), seed=0)

    native = losses(tmp_path / "native", config(max_steps=2), policy())
    with served(make_worker(small.model(), broadcasts=True)) as live:
        rollout = RolloutConfig(workers=(live.url,), sync="broadcast")
        remote = losses(tmp_path / "remote", config(max_steps=2, rollout=rollout), policy())
        assert live.worker.holder.version == 1
    assert not (tmp_path / "remote" / "weights").exists()
    for here, there in zip(native, remote, strict=True):
        assert there["loss"] == pytest.approx(here["loss"], abs=1e-4)
        assert there["ledger/correlation"] > 1 - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("push", ["weights", "adapter"])
def test_ten_steps_on_workers_are_ten_steps_in_the_trainer(tmp_path: Path, push: str):
    def policy() -> nn.Module:
        model = small.model()
        return apply_lora(model, LoraConfig(rank=2), seed=0) if push == "adapter" else model

    native = losses(tmp_path / "native", config(max_steps=10), policy())
    roots = {"weights_root": tmp_path}
    with (
        served(make_worker(small.model(), **roots)) as one,
        served(make_worker(small.model(), **roots)) as two,
    ):
        rollout = RolloutConfig(workers=(one.url, two.url), push=push)
        remote = losses(tmp_path / "remote", config(max_steps=10, rollout=rollout), policy())
    assert len(native) == len(remote) == 10
    for here, there in zip(native, remote, strict=True):
        for name in ("loss", "grad_norm", "reward/mean", "rollout/nll"):
            assert there[name] == pytest.approx(here[name], abs=1e-4), name
        assert there["ledger/correlation"] > 1 - 1e-9
        assert there["rollout/staleness_max"] == 0


def test_one_rollout_ahead_is_one_update_stale_and_seen_in_the_ledger(tmp_path: Path):
    with served(make_worker(small.model(), weights_root=tmp_path)) as live:
        rollout = RolloutConfig(workers=(live.url,), max_staleness=1)
        settings = config(max_steps=5, rollout=rollout, behaviour="engine")
        told = losses(tmp_path, settings, small.model())
        assert [line["rollout/staleness"] for line in told] == [0, 1, 1, 1, 1]
        assert told[0]["ledger/gap_p99"] < 1e-4 < told[2]["ledger/gap_p50"]
        wait_for(lambda: live.worker.driver.num_samples == 0)


class Killed(Exception):
    pass


class Mortal(GrpoCourse):
    def step(self, index: int) -> Step:
        if index == 4:
            raise Killed
        return super().step(index)


@pytest.mark.slow
def test_killed_while_sampling_ahead_a_run_ends_with_the_same_bits(tmp_path: Path):
    def attempt(folder: Path, kind: type[GrpoCourse]) -> nn.Module:
        with served(make_worker(small.model(), weights_root=tmp_path)) as live:
            rollout = RolloutConfig(
                workers=(live.url,), max_staleness=1, folder=str(tmp_path / "w")
            )
            settings = config(max_steps=6, save_every_steps=2, behaviour="engine", rollout=rollout)
            model, job = small.model(), small.job(folder)
            plain = course(settings, job, model)
            made = kind(
                settings,
                job,
                policy=model,
                reference=None,
                prompts=prompts(),
                tools=plain.tools,
            )
            plain.close()
            try:
                train(made, model, config=settings, job=job)
            except Killed:
                assert kind is Mortal
            finally:
                made.close()
            return model

    whole = attempt(tmp_path / "whole", GrpoCourse)
    attempt(tmp_path / "cut", Mortal)
    resumed = attempt(tmp_path / "cut", GrpoCourse)
    for (name, one), two in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_worker_that_changes_what_it_holds_stops_the_run_at_its_first_step(tmp_path: Path):
    worker = make_worker(small.model(), weights_root=tmp_path)
    push = worker.holder.push

    def spoiling(path: Path, version: int) -> Any:
        told = push(path, version)
        worker.driver.engine.model.lm_head.weight.data.mul_(1.01)
        return told

    worker.holder.push = spoiling  # type: ignore[method-assign]
    with served(worker) as live:
        settings = config(rollout=RolloutConfig(workers=(live.url,)))
        made = course(settings, small.job(tmp_path), small.model())
        with pytest.raises(
            ProofError, match=r"canary differ from the trainer's .*'lm_head.weight'"
        ):
            made.step(0)
        made.close()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"rollout": RolloutConfig(workers=("http://a",), max_staleness=1)},
            "max_staleness = 1 with behaviour = trainer, expected engine",
        ),
        ({"rollout": {"max_staleness": 1}}, "rollout.max_staleness says something of workers"),
        ({"rollout": {"workers": ("http://a", "http://a")}}, "expected each once"),
        (
            {"rollout": {"workers": ("http://a",), "sync": "broadcast", "push": "adapter"}},
            "rollout.push = adapter is of files, and rollout.sync = broadcast",
        ),
        (
            {"rollout": {"workers": ("http://a",), "sync": "broadcast", "folder": "w"}},
            "rollout.folder is of files, and rollout.sync = broadcast",
        ),
        ({"experts": "replay", "parallel": {"sequence": 2}}, "experts = replay with parallel.seq"),
    ],
)
def test_a_config_that_cannot_work_is_refused(bad: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        config(**bad)


def test_an_adapter_needs_adapters_and_a_key_its_variable(tmp_path: Path):
    job = small.job(tmp_path)
    for rollout, message in (
        ({"push": "adapter"}, "rollout.push = adapter, and the stage trains all weights"),
        ({"api_key_env": "NO_SUCH_KEY"}, "rollout.api_key_env = NO_SUCH_KEY: no such variable"),
    ):
        settings = config(rollout={"workers": ("http://localhost:1",), **rollout})
        with pytest.raises(ValueError, match=message):
            course(settings, job, small.model())


@contextmanager
def worker_process(
    folder: Path, root: Path, *more: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--port", str(port), "--weights-root", str(root), "--max-slots", "4", *more)
    command = [sys.executable, "-m", "stages", "serve-rollout", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "--max-tokens", "512"], env=environment)
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        assert process.poll() is None, "the worker ended"
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(is_up, 120)
        yield url, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.multi
def test_a_worker_killed_while_it_samples_costs_nothing_but_time(tmp_path: Path):
    start = small.start(tmp_path / "start")
    given = {"sequence_tokens": 512, "max_new_tokens": 300, "prompts_per_step": 5, "max_steps": 1}
    native = course(config(**given), small.job(tmp_path / "native"), small.model())
    expected = native.step(0)
    with worker_process(start, tmp_path) as (url, dying), worker_process(start, tmp_path) as other:
        rollout = RolloutConfig(workers=(url, other[0]))
        made = course(
            config(**given, rollout=rollout), small.job(tmp_path / "remote"), small.model()
        )
        alive: list[bool] = []

        def kill() -> None:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                told = httpx.get(f"{url}/health").json()
                # the proof asks for one sample a prompt, a step for four
                if told["policy_version"] == 0 and told["num_samples"] >= 4:
                    alive.append(True)
                    os.kill(dying.pid, signal.SIGKILL)
                    return

        killer = threading.Thread(target=kill)
        killer.start()
        step = made.step(0)
        killer.join()
        made.close()
    assert alive == [True], "the worker must die while it samples"
    assert dying.wait() == -signal.SIGKILL
    places = [place for batch in step.batches for place in batch.places]
    assert places == [place for batch in expected.batches for place in batch.places]
    for one, two in zip(step.batches, expected.batches, strict=True):
        assert torch.equal(one.packed.tokens, two.packed.tokens)
        torch.testing.assert_close(
            one.behaviour_logprobs, two.behaviour_logprobs, atol=1e-4, rtol=0
        )
    assert json.dumps(step.metrics["rollout/responses"]) == "20.0"
