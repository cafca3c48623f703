"""Two gloo processes make the reward model that one process makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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

from align.lora import LoraConfig
from align.trainers.reward import run
from tests.align import small
from tests.align.processes import shard_weights
from tests.align.trainers.test_reward import TREE, config

torch.set_num_threads(1)
folder, kind = Path(sys.argv[1]), sys.argv[2]
job = small.job(folder, folder.parent / "start", base=folder.parent)
if kind.startswith("fsdp"):
    shard_weights(job.accelerator)
lora = LoraConfig(rank=2) if kind.endswith("lora") else None
# Adam's first steps are signs of gradients, which would turn last bits near 0 into whole steps; a
# large eps makes them linear. Steps of 7 pairs: the second process has fewer microbatches.
optim = {"lr": 3e-2, "schedule": "constant", "eps": 1e-2}
tree = {**TREE, "gate": "learned"}
run(config(hierarchy=tree, batch_items=7, optim=optim, lora=lora, save_every_steps=2), job)
job.accelerator.end_training()
"""


@pytest.mark.multi
@pytest.mark.parametrize("kinds", [("whole", "whole", "fsdp"), ("lora", "fsdp-lora")])
def test_two_processes_make_the_reward_model_that_one_makes(tmp_path, kinds: tuple[str, ...]):
    write_pairs(tmp_path / "pairs.jsonl", 40)
    small.start(tmp_path / "start")
    for number, kind in enumerate(kinds):
        (tmp_path / str(number)).mkdir()
        told = launch(SCRIPT, [str(tmp_path / str(number)), kind], 2 if number else 1)
        assert not any("Traceback" in text for text in told), told
    one = RewardModel.load(tmp_path / "0" / "artifact")
    assert one.gate is not None
    for number in range(1, len(kinds)):
        folder = tmp_path / str(number) / "artifact"
        two = RewardModel.load(folder)
        for name, weight in one.state_dict().items():
            assert_close(name, two.state_dict()[name], weight, 1e-4)
        assert report(folder) == report(tmp_path / "0" / "artifact")


@pytest.mark.multi
def test_what_went_on_from_a_checkpoint_records_every_processs_pairs(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 40)
    small.start(tmp_path / "start")
    (tmp_path / "run").mkdir()
    record = tmp_path / "run" / "artifact" / "curriculum.jsonl"
    seen = []
    # the second time from the checkpoint of the last step
    for _ in range(2):
        told = launch(SCRIPT, [str(tmp_path / "run"), "whole"], 2)
        assert not any("Traceback" in text for text in told), told
        seen.append(record.read_bytes())
        record.unlink()
    assert seen[0] == seen[1]


def report(folder: Path) -> Any:
    return json.loads((folder / "held_out.json").read_text())
