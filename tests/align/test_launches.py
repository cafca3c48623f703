"""What a launch does not go with is told before anything is read, and so is who would idle."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.data.sources import DataConfig
from align.launches import Launch, check, idle, misfit
from align.loop import TrainConfig
from align.lora import LoraConfig
from align.trainers.grpo import GrpoConfig
from align.trainers.reward import RewardConfig
from model.parallel.mesh import ParallelConfig, launched_processes, launched_sharding

PRESETS = Path(__file__).parents[2] / "stages/launch"
DATA = (DataConfig(path="rows.jsonl"),)


@pytest.mark.parametrize(
    ("file", "launch"),
    [
        ("ddp", Launch(8)),
        ("sequence-parallel", Launch(8)),
        ("cpu", Launch(2)),
        ("fsdp2", Launch(8, "fsdp2")),
        ("deepspeed-zero3", Launch(8, "deepspeed")),
    ],
)
def test_the_presets_are_read(file: str, launch: Launch):
    assert Launch.read(PRESETS / f"{file}.yaml") == launch


def test_an_old_fsdp_and_a_missing_file(tmp_path: Path):
    text = (PRESETS / "fsdp2.yaml").read_text().replace("fsdp_version: 2", "fsdp_version: 1")
    (tmp_path / "old.yaml").write_text(text)
    assert Launch.read(tmp_path / "old.yaml") == Launch(8, "fsdp1")
    with pytest.raises(ValueError, match=r"gone.yaml: no such file, expected a config file"):
        Launch.read(tmp_path / "gone.yaml")


def test_what_accelerate_leaves_in_the_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.here() == Launch(0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert Launch.here() == Launch(4, "fsdp1")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert Launch.here() == Launch(4, "fsdp2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert (launched_processes(), launched_sharding()) == (4, "deepspeed")


@pytest.mark.parametrize(
    ("config", "launch", "key", "told"),
    [
        (TrainConfig(), Launch(2, "deepspeed"), "backend", "DeepSpeed is not supported"),
        (TrainConfig(), Launch(2, "fsdp1"), "backend", "set fsdp_version: 2"),
        (TrainConfig(backend="trl"), Launch(2, "fsdp2"), "backend", "expected native"),
        (
            TrainConfig(parallel=ParallelConfig(sequence=3)),
            Launch(4),
            "parallel.sequence",
            "a divisor of the 4 processes: 1, 2, 4",
        ),
        (
            TrainConfig(parallel=ParallelConfig(sequence=2)),
            Launch(2, "deepspeed"),
            "backend",
            "DeepSpeed is not supported",
        ),
    ],
)
def test_what_does_not_go_together(config: TrainConfig, launch: Launch, key: str, told: str):
    found = misfit(config, launch)
    assert found is not None
    assert (found[0], told in found[1]) == (key, True)
    with pytest.raises(ValueError, match=rf"^{key}( = \d+,|:) .*{told}"):
        check(config, launch)


def test_the_width_of_experts_is_looked_at():
    config = TrainConfig(parallel=ParallelConfig(expert=2, expert_tensor=3))
    found = misfit(config, Launch(12), num_experts=4, expert_width=80)
    assert found is not None
    assert found[0] == "parallel.expert_tensor"
    assert (
        "6 processes that parallel.expert leaves and of the model's expert width 80: 1, 2"
        in (found[1])
    )


def test_what_goes_together():
    shared = TrainConfig(parallel=ParallelConfig(sequence=2))
    for launch in (Launch(), Launch(2), Launch(4, "fsdp2")):
        assert misfit(shared, launch) is None
        assert misfit(TrainConfig(parallel=ParallelConfig(expert=2)), launch) is None
    assert misfit(TrainConfig(backend="trl"), Launch(2)) is None
    for config in (TrainConfig(lora=LoraConfig()), RewardConfig(data=DATA), GrpoConfig(data=DATA)):
        assert misfit(config, Launch(2, "fsdp2")) is None


@pytest.mark.parametrize(
    ("config", "processes", "told"),
    [
        (TrainConfig(batch_sequences=4, micro_sequences=4), 1, ""),
        (TrainConfig(batch_sequences=4, micro_sequences=2), 2, ""),
        (TrainConfig(batch_sequences=4, micro_sequences=3), 3, "1 of 3 processes idle"),
        (TrainConfig(batch_items=6, micro_sequences=6), 3, "a step is 1 microbatch or less"),
        (TrainConfig(batch_items=6, micro_sequences=6), 3, "set micro_sequences to 2"),
        (TrainConfig(batch_items=2), 3, "it has 2 sequences or less, too few for so many"),
        (
            TrainConfig(batch_sequences=2, micro_sequences=2, parallel=ParallelConfig(sequence=2)),
            4,
            "2 of 4 processes idle",
        ),
        (GrpoConfig(data=DATA, prompts_per_step=2, group_size=2, micro_sequences=4), 2, "1 of 2"),
        (TrainConfig(batch_sequences=1), 0, ""),
    ],
)
def test_processes_that_would_idle_are_counted(config: TrainConfig, processes: int, told: str):
    found = idle(config, Launch(processes))
    assert told in found
    assert bool(told) == bool(found)
