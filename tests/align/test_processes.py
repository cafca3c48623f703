"""Several gloo processes train what one process trains."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from tests.align.processes import launch
from tests.helpers import assert_close, slow

SCRIPT = """
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from align.data.loader import PackedData
from align.loop import TrainConfig, train
from align.lora import LoraConfig, apply_lora
from align.optim import OptimConfig
from align.policy import load_policy, save_policy
from align.trainers.dpo import DpoConfig, DpoCourse
from align.trainers.lm import LmCourse
from align.data.sources import DataConfig
from model.parallel.apply import parallelize
from model.parallel.mesh import ParallelConfig, open_mesh
from tests.align import small
from tests.align.processes import shard_weights
from tests.align.test_loop import Course

kind, folder, stop_before = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
kind, is_bf16 = kind.removesuffix("-bf16"), kind.endswith("-bf16")
torch.set_num_threads(1)
job = small.job(folder)
accelerator = job.accelerator
model = small.model()
if kind.startswith("fsdp") and accelerator.num_processes > 1:
    shard_weights(accelerator)
ranks = accelerator.num_processes
parallel = ParallelConfig(sequence=2 if kind == "fsdp-rows" and ranks > 1 else 1)
if kind == "experts":
    parallel = ParallelConfig(expert=ranks)
elif kind in ("fsdp-experts", "fsdp-experts-dpo") and ranks > 1:
    parallel = ParallelConfig(expert=2)
elif kind == "experts-dpo":
    parallel = ParallelConfig(expert=min(ranks, 2), expert_tensor=2 if ranks == 4 else 1)
is_sharded = kind.startswith("fsdp")
parallelize(model, open_mesh(parallel, device_type="cpu", is_sharded=is_sharded), parallel)
optim = OptimConfig(lr=1e-2, clip_norm=0.5)
if is_bf16:
    weights = {"lm": "bf16_stochastic", "fsdp": "bf16_master"}[kind]
    optim = OptimConfig(lr=1e-2, clip_norm=0.5, weights=weights)
    model.bfloat16()
# 7 rows in steps of 3: the second process has fewer microbatches, and none in the last step.
shape = {"sequence_tokens": 24, "batch_items": 3, "epochs": 2}

class Stop(Exception):
    pass

dies = kind in ("killed", "stuck") and accelerator.process_index == 1

def stopping(course_type):
    class Stopping(course_type):
        def step(self, index):
            if index == stop_before:
                if kind in ("killed", "stuck"):
                    if dies:
                        (folder / "killed").write_text(str(time.time()))
                        os.kill(os.getpid(), signal.SIGKILL)
                    if kind == "stuck":
                        # as a host that waits for a kernel which waits for who is gone
                        time.sleep(300)
                else:
                    raise Stop
            return super().step(index)
    return Stopping

if kind.endswith("dpo"):
    model = apply_lora(model, LoraConfig(rank=2), seed=0)
    config = DpoConfig(
        data=(DataConfig(path="x"),), optim=optim, lora=LoraConfig(rank=2), save_every_steps=2,
        parallel=parallel, checkpointing="full" if kind == "experts-dpo" else "none",
    )
    data = PackedData(small.pairs(7), **shape)
    course = stopping(DpoCourse)(data, accelerator, reference=model, config=config)
else:
    precision = "fp32" if optim.weights == "fp32" else "bf16"
    config = TrainConfig(
        optim=optim,
        save_every_steps=2,
        precision=precision,
        checkpointing="selective" if kind == "fsdp" else "none",
        parallel=parallel,
    )
    data = PackedData(small.examples(7), **shape)
    course = stopping(LmCourse)(data, accelerator, ranks_per_row=parallel.sequence)
    if kind == "poisoned":
        shared = LmCourse.loss
        def loss(self, model, batch):
            made = shared(self, model, batch)
            return made if "rows.jsonl:2" not in batch.places else type(made)(sum=made.sum / 0)
        type(course).loss = loss
try:
    train(course, model, config=config, job=job)
except Stop:
    sys.exit(0)
if kind.startswith("fsdp"):
    is_sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert is_sharded == (ranks > 1)
    if kind == "fsdp-experts" and ranks > 1:
        experts = [p for name, p in model.named_parameters() if "mlp.experts" in name]
        assert all(p.to_local().numel() * ranks == p.numel() for p in experts)
    base = small.start(folder / "base") if kind.endswith("dpo") else None
    save_policy(model, small.tokenizer(), folder / "artifact", base=base)
    model = load_policy(folder / "artifact")[0] if accelerator.is_main_process else model
if accelerator.is_main_process and not kind.startswith("experts"):
    torch.save(model.state_dict(), folder / "final.pt")
accelerator.end_training()
"""


def run(kind: str, folder: Path, processes: int, stop_before: int = -1) -> list[str]:
    """Runs the script on so many processes; returns what each wrote to stderr."""
    folder.mkdir(exist_ok=True)
    return launch(SCRIPT, [kind, str(folder), str(stop_before)], processes)


def lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def results(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    return torch.load(folder / "final.pt"), lines(folder)


@pytest.mark.multi
@pytest.mark.parametrize(
    "kind", ["lm", "dpo", "fsdp", "fsdp-rows", "fsdp-dpo", "fsdp-experts", "fsdp-experts-dpo"]
)
def test_two_processes_train_what_one_trains(tmp_path: Path, kind: str) -> None:
    train_alike(tmp_path, kind, 2)


@pytest.mark.multi
@pytest.mark.parametrize("kind", ["fsdp-experts", "fsdp-experts-dpo"])
def test_two_processes_hold_the_same_of_shared_experts(tmp_path: Path, kind: str) -> None:
    train_alike(tmp_path, kind, 4)


def train_alike(tmp_path: Path, kind: str, processes: int) -> None:
    for name, number in (("1", 1), ("2", processes)):
        told = run(kind, tmp_path / name, number)
        assert (tmp_path / name / "final.pt").exists(), told
    (one, one_lines), (two, two_lines) = results(tmp_path / "1"), results(tmp_path / "2")
    for name, weight in one.items():
        assert_close(name, two[name], weight, 1e-4)
    assert len(one_lines) == len(two_lines) == 6
    for first, second in zip(one_lines, two_lines, strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"seconds", "tokens_per_s"}:
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name


@pytest.mark.multi
@pytest.mark.parametrize("kind", ["lm", "fsdp-bf16", *slow("fsdp", "lm-bf16")])
def test_resumed_run_on_two_processes_is_bit_identical(tmp_path: Path, kind: str) -> None:
    run(kind, tmp_path / "whole", 2)
    run(kind, tmp_path / "cut", 2, stop_before=5)
    assert not (tmp_path / "cut" / "final.pt").exists()
    run(kind, tmp_path / "cut", 2)
    (whole, _), (cut, _) = results(tmp_path / "whole"), results(tmp_path / "cut")
    for name, weight in whole.items():
        assert torch.equal(cut[name], weight), name


@pytest.mark.multi
@pytest.mark.parametrize(
    "kind",
    ["fsdp", "experts-dpo", *slow("lm", "dpo", "fsdp-rows", "experts", "fsdp-experts")],
)
def test_two_processes_begin_and_one_or_four_go_on(tmp_path: Path, kind: str) -> None:
    run(kind, tmp_path / "2", 2)
    run(kind, tmp_path / "cut", 2, stop_before=5)
    wanted = lines(tmp_path / "2")
    for processes in (1, 4):
        folder = tmp_path / str(processes)
        shutil.copytree(tmp_path / "cut", folder)
        told = run(kind, folder, processes)
        found = lines(folder)
        assert len(found) == len(wanted) == 6, told
        # the first four were made by two processes and are read from the checkpoint's folder
        assert found[:4] == lines(tmp_path / "cut")[:4]
        for first, second in zip(wanted[4:], found[4:], strict=True):
            for name in first.keys() - {"seconds", "tokens_per_s"}:
                assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), name


@pytest.mark.multi
def test_when_one_process_is_killed_the_others_stop_and_say_where(tmp_path: Path) -> None:
    told = run("killed", tmp_path / "run", 4, stop_before=3)
    assert time.time() - float((tmp_path / "run" / "killed").read_text()) < 60
    assert told[1] == "" or "RuntimeError" not in told[1]
    for rank in (0, 2, 3):
        last = [line for line in told[rank].splitlines() if "RuntimeError" in line][-1]
        assert f"stage: process {rank} stops at step 4: process 1 is gone (" in last
    # what was written before is whole, and nothing else is there
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    assert run("lm", tmp_path / "run", 2)[0] == ""
    assert len(lines(tmp_path / "run")) == 6


@pytest.mark.multi
def test_processes_that_wait_for_a_killed_one_are_ended_and_say_where(tmp_path: Path) -> None:
    told = run("stuck", tmp_path / "run", 4, stop_before=3)
    assert time.time() - float((tmp_path / "run" / "killed").read_text()) < 60
    for rank in (0, 2, 3):
        assert f"stage: process {rank} stops at step 4: process 1 is gone;" in told[rank]
    assert run("lm", tmp_path / "run", 2)[0] == ""


@pytest.mark.multi
def test_every_process_fails_and_names_the_rows(tmp_path: Path) -> None:
    for told in run("poisoned", tmp_path / "run", 2):
        last = [line for line in told.splitlines() if "RuntimeError" in line][-1]
        assert "loss = inf" in last
        assert "rows.jsonl:2" in last
