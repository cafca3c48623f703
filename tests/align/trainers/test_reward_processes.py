"""Two gloo processes make the reward model that one process makes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from reward.model import RewardModel
from tests.align import small
from tests.align.trainers.test_reward import write_pairs
from tests.helpers import assert_close

ROOT = Path(__file__).parents[3]

SCRIPT = """
import sys
from pathlib import Path

import torch

from align.trainers.reward import run
from tests.align import small
from tests.align.trainers.test_reward import TREE, config

torch.set_num_threads(1)
folder = Path(sys.argv[1])
job = small.job(folder, folder.parent / "start", base=folder.parent)
# Adam's first steps are signs of gradients, which would turn last bits near 0 into whole steps; a
# large eps makes them linear. Steps of 7 pairs: the second process has fewer microbatches.
optim = {"lr": 3e-2, "schedule": "constant", "eps": 1e-2}
run(config(hierarchy={**TREE, "gate": "learned"}, batch_items=7, optim=optim), job)
job.accelerator.end_training()
"""


def run(folder: Path, processes: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if processes > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder)],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if processes > 1
            else {**os.environ, **shared},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    told = [process.communicate(timeout=240)[1] for process in started]
    assert all(process.returncode == 0 for process in started), told


@pytest.mark.multi
def test_two_processes_make_the_reward_model_that_one_makes(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 40)
    small.start(tmp_path / "start")
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        run(tmp_path / str(processes), processes)
    one, two = (RewardModel.load(tmp_path / name / "artifact") for name in ("1", "2"))
    assert one.gate is not None
    for name, weight in one.state_dict().items():
        assert_close(name, two.state_dict()[name], weight, 1e-4)
    reports = [
        json.loads((tmp_path / name / "artifact" / "held_out.json").read_text())
        for name in ("1", "2")
    ]
    assert reports[0] == reports[1]
