"""Real processes: two learn what one does, and a killed one goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.align import small
from tests.helpers import assert_close, slow
from tests.rollout.live import make_worker, served

ROOT = Path(__file__).parents[3]

SCRIPT = """
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from align.engines import RolloutConfig
from align.loop import train
from align.lora import LoraConfig
from align.losses.policy import PolicyLossConfig
from align.optim import OptimConfig
from align.trainers.grpo import GrpoConfig, GrpoCourse, Tools
from align.trainers.lm import adapted
from model.parallel.apply import parallelize
from model.parallel.mesh import ParallelConfig, open_mesh
from rollout.sync import weights
from tests.align import small
from tests.align.processes import shard_weights
from tests.align.trainers.grpo_setting import ShareScorer, config, prompts

torch.set_num_threads(1)
folder, kill_at, sequence = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
kind, sync, *workers = sys.argv[4:]
rollout = RolloutConfig(workers=workers, sync=sync) if workers else RolloutConfig()
# 5 prompts in steps of 3: the second process has one of the first step and one of the second
settings = config(
    max_steps=0, epochs=2, prompts_per_step=3, updates_per_rollout=2, scale="batch",
    optim=OptimConfig(lr=1e-3, schedule="constant"), save_every_steps=1,
    parallel=ParallelConfig(sequence=sequence), rollout=rollout,
    lora=LoraConfig(rank=2) if kind.endswith("lora") else None,
)
model, job = small.model(), small.job(folder)
if kind.startswith("fsdp"):
    shard_weights(job.accelerator)
parallelize(model, open_mesh(settings.parallel, device_type="cpu"), settings.parallel)
policy = adapted(model, settings, job)
tools = Tools(small.tokenizer(), ShareScorer())

class Course(GrpoCourse):
    def step(self, index):
        if index == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(index)

course = Course(
    settings, job, policy=policy, reference=None, prompts=prompts(), tools=tools
)
train(course, policy, config=settings, job=job)
course.close()
final = dict(weights(policy))
if job.accelerator.is_main_process:
    torch.save(final, folder / "final.pt")
job.accelerator.end_training()
"""


def run(
    folder: Path,
    processes: int,
    *,
    kill_at: int = -1,
    sequence: int = 1,
    kind: str = "whole",
    sync: str = "files",
    workers: tuple[str, ...] = (),
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder.mkdir(exist_ok=True)
    started = []
    for rank in range(processes):
        more = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if processes > 1:
            more |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank)}
            more |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            more |= {"LOCAL_WORLD_SIZE": str(processes)}
        command = [sys.executable, "-c", SCRIPT, str(folder), str(kill_at), str(sequence)]
        command += [kind, sync, *workers]
        environment = {**os.environ, **more}
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        )
    told = [process.communicate(timeout=240)[1] for process in started]
    expected = 0 if kill_at < 0 else -signal.SIGKILL
    assert [process.returncode for process in started] == [expected] * processes, told


def results(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return torch.load(folder / "final.pt"), [json.loads(line) for line in lines]


@pytest.mark.multi
def test_two_processes_sample_and_learn_what_one_does(tmp_path: Path):
    run(tmp_path / "1", 1)
    run(tmp_path / "2", 2)
    assert_same(tmp_path)


@pytest.mark.multi
@pytest.mark.parametrize("kind", ["fsdp-lora", *slow("fsdp")])
def test_two_processes_that_shard_weights_learn_what_one_does(tmp_path: Path, kind: str):
    run(tmp_path / "1", 1, kind=kind.replace("fsdp", "whole"))
    run(tmp_path / "2", 2, kind=kind)
    assert_same(tmp_path)


@pytest.mark.multi
@pytest.mark.parametrize(
    ("sequence", "sync"),
    [(2, "files"), (1, "broadcast"), *slow((1, "files"))],
)
def test_two_processes_with_a_worker_learn_what_one_does_without(
    tmp_path: Path, sequence: int, sync: str
):
    run(tmp_path / "1", 1)
    with served(make_worker(small.model(), weights_root=tmp_path, broadcasts=True)) as live:
        run(tmp_path / "2", 2, sequence=sequence, sync=sync, workers=(live.url,))
    assert_same(tmp_path)


def assert_same(tmp_path: Path) -> None:
    (one, one_lines), (two, two_lines) = results(tmp_path / "1"), results(tmp_path / "2")
    assert len(one_lines) == len(two_lines) == 4
    for first, second in zip(one_lines, two_lines, strict=True):
        assert first.keys() == second.keys()
        # the engine's rounding depends on the size of its batches
        for name in first.keys() - {"seconds", "tokens_per_s"}:
            if name.startswith(("engine/gap", "ledger/gap")):
                continue
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
    for name, weight in one.items():
        assert_close(name, two[name], weight, 1e-4)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_rollout_it_ends_with_the_same_bits(tmp_path: Path):
    run(tmp_path / "whole", 1)
    run(tmp_path / "killed", 1, kill_at=3)
    assert not (tmp_path / "killed" / "final.pt").exists()
    run(tmp_path / "killed", 1)
    (whole, lines), (killed, other_lines) = (results(tmp_path / n) for n in ("whole", "killed"))
    assert all(torch.equal(weight, killed[name]) for name, weight in whole.items())
    timed = {"seconds": 0.0, "tokens_per_s": 0.0}
    assert [{**line, **timed} for line in lines] == [{**line, **timed} for line in other_lines]
