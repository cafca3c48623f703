"""Two gloo processes make the reward model that one process makes."""

from __future__ import annotations

import json

import pytest

from reward.model import RewardModel
from tests.align import small
from tests.align.processes import launch
from tests.align.trainers.test_reward import write_pairs
from tests.helpers import assert_close

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


@pytest.mark.multi
def test_two_processes_make_the_reward_model_that_one_makes(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 40)
    small.start(tmp_path / "start")
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        told = launch(SCRIPT, [str(tmp_path / str(processes))], processes)
        assert not any("Traceback" in text for text in told), told
    one, two = (RewardModel.load(tmp_path / name / "artifact") for name in ("1", "2"))
    assert one.gate is not None
    for name, weight in one.state_dict().items():
        assert_close(name, two.state_dict()[name], weight, 1e-4)
    reports = [
        json.loads((tmp_path / name / "artifact" / "held_out.json").read_text())
        for name in ("1", "2")
    ]
    assert reports[0] == reports[1]
