from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from align.data.sources import DataConfig
from align.lora import LoraConfig
from align.optim import OptimConfig
from align.policy import load_policy
from align.trainers import lm, sft
from align.trainers.lm import FixedCourse, LmConfig
from align.trainers.sft import SftConfig
from tests.align import small

FAST = OptimConfig(lr=1e-2, schedule="constant")


def texts(folder: Path) -> DataConfig:
    lines = [json.dumps({"text": f"the cat sat on mat {i}"}) for i in range(12)]
    small.write_lines(folder / "texts.jsonl", lines)
    return DataConfig(path="texts.jsonl", split="all", licence="CC0")


def chats(folder: Path) -> DataConfig:
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"the cat {i}"},
                    {"role": "assistant", "content": "sat on the mat"},
                ]
            }
        )
        for i in range(12)
    ]
    small.write_lines(folder / "chats.jsonl", lines)
    return DataConfig(path="chats.jsonl", split="all")


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_lm_learns_and_leaves_a_policy(tmp_path: Path) -> None:
    config = LmConfig(
        data=(texts(tmp_path),), sequence_tokens=64, batch_items=6, epochs=4, optim=FAST
    )
    job = small.job(tmp_path, small.start(tmp_path / "start"))
    outcome = lm.run(config, job)
    told = losses(tmp_path)
    assert len(told) == 8
    assert told[-1] < 0.7 * told[0]
    assert outcome.metrics["loss"] == told[-1]
    assert outcome.metrics["tokens"] == 4 * outcome.data[0]["tokens"]
    assert (outcome.data[0]["rows"], outcome.data[0]["licence"]) == (12, "CC0")
    trained, _ = load_policy(job.artifact)
    start, _ = load_policy(job.start)
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)


def test_sft_trains_only_what_the_assistant_wrote(tmp_path: Path) -> None:
    config = SftConfig(
        data=(chats(tmp_path),), sequence_tokens=64, batch_items=6, epochs=4, optim=FAST
    )
    job = small.job(tmp_path, small.start(tmp_path / "start"))
    outcome = sft.run(config, job)
    told = losses(tmp_path)
    assert told[-1] < 0.5 * told[0]
    rendered = small.tokenizer()("sat on the mat")["input_ids"]
    assert outcome.metrics["trained_tokens"] == 4 * 12 * (len(rendered) + 1)
    assert outcome.metrics["tokens"] > 2 * outcome.metrics["trained_tokens"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sft_with_adapters_leaves_an_adapter_and_its_base_alone(
    tmp_path: Path, precision: str
) -> None:
    start = small.start(tmp_path / "start")
    before = (start / "model.safetensors").read_bytes()
    config = SftConfig(
        data=(chats(tmp_path),),
        sequence_tokens=64,
        batch_items=6,
        epochs=4,
        optim=FAST,
        lora=LoraConfig(rank=4),
        precision=precision,
    )
    job = small.job(tmp_path, start)
    sft.run(config, job)
    told = losses(tmp_path)
    assert told[-1] < 0.7 * told[0]
    assert (start / "model.safetensors").read_bytes() == before
    assert (job.artifact / "adapter_model.safetensors").exists()
    assert not (job.artifact / "model.safetensors").exists()
    opened, _ = load_policy(job.artifact)
    raw, _ = load_policy(start)
    assert torch.equal(opened.lm_head.weight, raw.lm_head.weight)
    first, other = (m.model.layers[0].mlp.experts.down_proj for m in (opened, raw))
    assert not torch.equal(first, other)


def test_course_of_fixed_rows_refuses_foreign_state(tmp_path: Path) -> None:
    job = small.job(tmp_path)
    course = FixedCourse.__new__(FixedCourse)
    course.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"course state \['waiting'\], expected none"):
        course.load_state_dict({"waiting": 1})
    assert job.seed == 0


def test_config_is_strict() -> None:
    with pytest.raises(ValidationError, match="data"):
        SftConfig()
    with pytest.raises(ValidationError, match="Input should be 'native'"):
        LmConfig(data=(DataConfig(path="x"),), backend="trl")
    with pytest.raises(ValidationError, match="bacth_items"):
        SftConfig(data=(DataConfig(path="x"),), bacth_items=3)
