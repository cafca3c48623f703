"""Every kind of stage learns on shared rows and shared experts what it learns on one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from align.data.loader import PackedData
from align.loop import TrainConfig
from align.lora import LoraConfig
from align.losses.policy import PolicyLossConfig
from align.optim import OptimConfig
from align.policy import load_policy
from align.trainers import dpo, lm, reward, sft
from align.trainers.dpo import DpoConfig
from align.trainers.grpo import GrpoCourse, Tools
from align.trainers.lm import FixedCourse, LmConfig, adapted, fit, open_start
from align.trainers.reward import RewardConfig
from align.trainers.sft import SftConfig
from align.update import Precision
from model.parallel.mesh import ParallelConfig
from reward.model import RewardModel
from tests.align import small
from tests.align.trainers import grpo_setting
from tests.align.trainers.test_dpo import preferences
from tests.align.trainers.test_lm import chats, texts
from tests.align.trainers.test_reward import TREE, write_pairs
from tests.helpers import assert_close
from tests.model.parallel.world import world

# Adam's first steps are signs of gradients, which would turn last bits near 0 into whole steps; a
# large eps makes them linear
OPTIM = OptimConfig(lr=1e-2, schedule="constant", eps=1e-2, clip_norm=0.5)
TIMES = {"seconds", "tokens_per_s", "engine/gap", "engine/gap_max"}


class Run(NamedTuple):
    """One stage in one folder."""

    kind: str
    folder: Path
    parallel: ParallelConfig
    lora: LoraConfig | None = None
    start: str = "start"
    precision: Precision = "fp32"
    sequence_tokens: int = 128


def climb(run: Run) -> None:
    """Trains in run.folder from the policy in the folder beside it."""
    base, folder = run.folder.parent, run.folder
    job = small.job(folder, base / run.start, base=base)
    # 3 rows of 12: the ranks have unlike numbers of microbatches, and in the last step some none
    shared: dict[str, Any] = {"optim": OPTIM, "parallel": run.parallel}
    shared |= {"precision": run.precision, "sequence_tokens": run.sequence_tokens}
    shape = {**shared, "batch_items": 5, "lora": run.lora}
    if run.kind == "lm":
        lm.run(LmConfig(data=(texts(base),), **shape | {"sequence_tokens": 24}), job)
    elif run.kind == "sft":
        sft.run(SftConfig(data=(chats(base),), **shape), job)
    elif run.kind == "dpo":
        dpo.run(DpoConfig(data=(preferences(base),), sft_weight=0.3, **shape), job)
    elif run.kind == "reward":
        data = ({"path": "rewards.jsonl", "split": "train", "dev_share": 0.3},)
        config = RewardConfig(data=data, hierarchy={**TREE, "gate": "learned"}, **shape)
        reward.run(config, job)
    else:
        loss = PolicyLossConfig(objective="grpo")
        more: dict[str, Any] = {"epochs": 2, "max_steps": 0, "updates_per_rollout": 2}
        more |= {"scale": "batch", "prompts_per_step": 3, "loss": loss, "lora": run.lora}
        config = grpo_setting.config(**shared, **more)
        model = adapted(open_start(config, job)[0], config, job)
        tools = Tools(small.tokenizer(), grpo_setting.ShareScorer())
        course = GrpoCourse(
            config, job, policy=model, reference=None, prompts=grpo_setting.prompts(), tools=tools
        )
        fit(course, model, small.tokenizer(), config=config, job=job)
    job.accelerator.wait_for_everyone()


def climb_all(runs: list[Run]) -> None:
    for run in runs:
        climb(run)


def weights(folder: Path, kind: str) -> dict[str, Tensor]:
    if kind == "reward":
        return RewardModel.load(folder / "artifact").state_dict()
    return load_policy(folder / "artifact")[0].state_dict()


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check(
    sizes: list[tuple[str, ParallelConfig, Any]],
    ranks: int,
    base: Path,
    precision: Precision = "fp32",
) -> None:
    small.start(base / "start", router_aux_loss_coef=0.1)
    small.start(base / "plain")
    write_pairs(base / "rewards.jsonl", 20)
    runs, alone = [], []
    for number, (kind, parallel, lora) in enumerate(sizes):
        for folder in (base / f"{number}-shared", base / f"{number}-alone"):
            folder.mkdir()
        # what processes sample they also pack, and a balance loss depends on who shares a row
        start = "plain" if kind == "grpo" and parallel.sequence < ranks else "start"
        more = lora, start, precision
        runs.append(Run(kind, base / f"{number}-shared", parallel, *more))
        alone.append(Run(kind, base / f"{number}-alone", ParallelConfig(), *more))
    world(ranks, climb_all, runs, base)
    climb_all(alone)
    for run, one in zip(runs, alone, strict=True):
        name = f"{run.kind} {run.parallel}"
        reference = weights(one.folder, run.kind)
        moved = load_policy(base / "start")[0].state_dict() if run.kind != "reward" else {}
        assert run.kind == "reward" or any(
            not torch.equal(moved[key], reference[key]) for key in moved
        )
        found = weights(run.folder, run.kind)
        for key, weight in reference.items():
            assert_close(f"{name}: {key}", found[key], weight)
            assert precision != "fp64" or torch.equal(found[key], weight), (name, key)
        told, wanted = lines(run.folder), lines(one.folder)
        assert len(told) == len(wanted) > 1
        for first, second in zip(wanted, told, strict=True):
            assert first.keys() == second.keys()
            for key in first.keys() - TIMES:
                if run.lora and key.startswith("ledger/gap"):
                    # a copy samples with merged adapters, which are rounded otherwise
                    continue
                assert second[key] == pytest.approx(first[key], rel=1e-5, abs=1e-6), (name, key)


ROWS, EXPERTS = ParallelConfig(sequence=2), ParallelConfig(expert=2)


@pytest.mark.multi
def test_two_processes_share_rows_and_experts(tmp_path: Path):
    check([("sft", ROWS, None), ("dpo", ROWS, None), ("lm", EXPERTS, None)], 2, tmp_path)
    names = load_file(tmp_path / "2-shared" / "artifact" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "2-alone" / "artifact" / "model.safetensors").keys()


@pytest.mark.multi
def test_in_fp64_processes_that_share_leave_the_bits_of_one(tmp_path: Path):
    both = ParallelConfig(sequence=2, expert=2)
    sizes = [("lm", EXPERTS, None), ("sft", both, None), ("dpo", ROWS, LoraConfig(rank=2))]
    check([*sizes, ("reward", both, None), ("grpo", both, None)], 2, tmp_path, "fp64")


@pytest.mark.multi
def test_two_processes_share_every_kind_of_stage(tmp_path: Path):
    both = ParallelConfig(sequence=2, expert=2)
    sizes = [
        ("lm", ROWS, LoraConfig(rank=2)),
        ("dpo", ROWS, LoraConfig(rank=2)),
        ("reward", ROWS, None),
        ("reward", both, LoraConfig(rank=2)),
        ("reward", EXPERTS, None),
        ("grpo", ROWS, None),
        ("grpo", both, None),
        ("grpo", EXPERTS, LoraConfig(rank=2)),
        ("dpo", EXPERTS, None),
        ("sft", both, LoraConfig(rank=2, targets="attention")),
        ("dpo", both, LoraConfig(rank=2, router=True)),
        ("lm", EXPERTS, LoraConfig(rank=2, targets="experts")),
    ]
    check(sizes, 2, tmp_path)


@pytest.mark.multi
def test_four_processes_share_rows_experts_and_data(tmp_path: Path):
    sizes = [
        ("lm", ParallelConfig(sequence=2, expert=4), None),
        ("sft", ParallelConfig(expert=2, expert_tensor=2), None),
        ("dpo", ParallelConfig(expert=2, expert_tensor=2), LoraConfig(rank=2)),
        ("lm", ParallelConfig(expert=4), LoraConfig(rank=2)),
        ("sft", ParallelConfig(sequence=4), None),
        ("dpo", ParallelConfig(sequence=2, expert=2), None),
        ("reward", ROWS, None),
        ("grpo", ROWS, None),
    ]
    check(sizes, 4, tmp_path)


@pytest.mark.parametrize(
    ("config", "keys", "told"),
    [
        (TrainConfig, {"backend": "trl"}, "parallel.sequence = 2 and .* backend = trl"),
        (TrainConfig, {"sequence_tokens": 2, "parallel": {"sequence": 4}}, "at most sequence_tok"),
    ],
)
def test_what_cannot_be_shared_is_refused(config: type[TrainConfig], keys: Any, told: str):
    data = {} if config is TrainConfig else {"data": grpo_setting.DATA}
    with pytest.raises(ValidationError, match=told):
        config(**{"parallel": {"sequence": 2}} | data | keys)


def test_a_row_has_a_token_for_each_process():
    data = PackedData(small.examples(3), sequence_tokens=24)
    short = min(data.lengths)
    with pytest.raises(ValueError, match=rf"rows.jsonl:\d: {short} tokens, .* = 16 processes"):
        FixedCourse(data, Accelerator(cpu=True), ranks_per_row=16)


def test_one_process_cannot_share(tmp_path: Path):
    config = LmConfig(data=(texts(tmp_path),), parallel=ROWS)
    with pytest.raises(ValueError, match=r"parallel.sequence = 2, .* the 1 processes: 1$"):
        lm.run(config, small.job(tmp_path))
