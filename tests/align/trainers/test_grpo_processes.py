"""Two gloo processes sample and learn what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import assert_close

ROOT = Path(__file__).parents[3]

SCRIPT = """
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from align.loop import train
from align.losses.policy import PolicyLossConfig
from align.optim import OptimConfig
from align.trainers.grpo import GrpoConfig, GrpoCourse, Tools
from tests.align import small
from tests.align.trainers.test_grpo import ShareScorer, config, prompts

torch.set_num_threads(1)
folder = Path(sys.argv[1])
# 5 prompts in steps of 3: the second process has one of the first step and one of the second
settings = config(
    max_steps=0, epochs=2, prompts_per_step=3, updates_per_rollout=2, scale="batch",
    optim=OptimConfig(lr=1e-3, schedule="constant"),
)
model, job = small.model(), small.job(folder)
tools = Tools(small.tokenizer(), ShareScorer())
course = GrpoCourse(
    settings, job, policy=model, reference=None, prompts=prompts(), tools=tools
)
train(course, model, config=settings, job=job)
if job.accelerator.is_main_process:
    torch.save(model.state_dict(), folder / "final.pt")
job.accelerator.end_training()
"""


def run(folder: Path, processes: int) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder.mkdir()
    started = []
    for rank in range(processes):
        more = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if processes > 1:
            more |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank)}
            more |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            more |= {"LOCAL_WORLD_SIZE": str(processes)}
        command = [sys.executable, "-c", SCRIPT, str(folder)]
        environment = {**os.environ, **more}
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        )
    told = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, told
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return torch.load(folder / "final.pt"), [json.loads(line) for line in lines]


@pytest.mark.multi
def test_two_processes_sample_and_learn_what_one_does(tmp_path: Path):
    one, one_lines = run(tmp_path / "1", 1)
    two, two_lines = run(tmp_path / "2", 2)
    assert len(one_lines) == len(two_lines) == 4
    for first, second in zip(one_lines, two_lines, strict=True):
        assert first.keys() == second.keys()
        # the engine's rounding depends on the size of its batches
        for name in first.keys() - {"seconds", "tokens_per_s", "engine/gap", "engine/gap_max"}:
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
    for name, weight in one.items():
        assert_close(name, two[name], weight, 1e-4)
